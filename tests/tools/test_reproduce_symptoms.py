"""Each symptom of docs/symptoms.md shows when its setting is wrong."""

import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
PATH = ROOT / "tools" / "reproduce_symptoms.py"
NAMES = re.findall(r'^    "(\w+)": Symptom\(', PATH.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def tool():
  spec = importlib.util.spec_from_file_location(PATH.stem, PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_the_page_has_each_symptom_with_numbers_that_show_it(tool):
  page = (ROOT / "docs" / "symptoms.md").read_text()
  rows = dict(
    (name, (float(healthy), float(broken)))
    for name, healthy, broken in re.findall(
      r"^\| `(\w+)` \|[^|]*\| ([\d.e+-]+) \| ([\d.e+-]+) \|", page, re.MULTILINE
    )
  )
  symptoms = tool.symptoms()
  assert list(symptoms) == NAMES
  assert rows.keys() == symptoms.keys()
  for name, numbers in rows.items():
    assert symptoms[name].shows(*numbers), name
    assert not symptoms[name].shows(*numbers[::-1]), name


def test_a_wrong_setting_is_the_only_difference(tool):
  for symptom in tool.symptoms().values():
    healthy = tool.build(symptom.stage, (), 3).config
    broken = tool.build(symptom.stage, symptom.changes, 3).config
    changed = tool.differences(healthy, broken)
    assert len(changed) == len(symptom.changes)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_symptom_shows(tool, name, capsys):
  assert tool.main([name]) == 0
  assert f"| `{name}` |" in capsys.readouterr().out

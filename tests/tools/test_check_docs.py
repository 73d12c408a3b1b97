"""Names in the documents exist, and a name that does not is found."""

import pathlib
import runpy

ROOT = pathlib.Path(__file__).parent.parent.parent
CHECK = runpy.run_path(str(ROOT / "tools" / "check_docs.py"))
EQUATIONS = ROOT / "docs" / "equations.md"


def test_the_functions_of_the_equations_exist():
  assert len(CHECK["NAME"].findall(EQUATIONS.read_text())) > 30
  assert list(CHECK["_names"](EQUATIONS)) == []


def test_every_equation_has_its_row():
  rows = [r for r in EQUATIONS.read_text().splitlines() if r.startswith("|")]
  numbered = "\n".join(row.split("|")[1] for row in rows)
  ranges = numbered.replace("(15)-(17)", "(15) (16) (17)")
  for number in {*range(1, 19)} - {5, 6}:
    assert f"({number})" in ranges, number


def test_names_that_do_not_exist_are_found(tmp_path):
  page = tmp_path / "page.md"
  page.write_text(
    "`crcm_jax.losses.flow_matching_loss` and `crcm_jax.sampling.rollout()`,\n"
    "`crcm_jax.losses.nothing_loss`, `crcm_jax.nothing.rollout`\n"
    "```\n`crcm_jax.in_a_block`\n```\n"
  )
  found = list(CHECK["_names"](page))
  assert [message.split("`")[1] for message in found] == [
    "crcm_jax.losses.nothing_loss",
    "crcm_jax.nothing.rollout",
  ]

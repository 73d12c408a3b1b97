import ml_collections
import pytest

from crcm_jax.training import _config

FILE = """
import ml_collections

def get_config(variant="small"):
  return ml_collections.ConfigDict(dict(
    seed=0, name=variant, optimizer=dict(learning_rate=1e-3, nesterov=False)))
"""


@pytest.fixture
def config_file(tmp_path):
  path = tmp_path / "some.py"
  path.write_text(FILE)
  return str(path)


def optimizer(*, learning_rate, decay=0.0):
  return learning_rate, decay


def test_a_variant_is_the_argument_of_get_config(config_file):
  assert _config.load_config(config_file).name == "small"
  assert _config.load_config(f"{config_file}:large").name == "large"


def test_overrides_keep_the_type(config_file):
  config = _config.load_config(
    config_file, ["optimizer.learning_rate=1", "name=3", "seed=2"]
  )
  assert config.optimizer.learning_rate == 1.0
  assert config.name == "3"
  assert config.seed == 2
  assert config.is_locked
  with pytest.raises(ValueError, match=r"`--config.seed` must be of type int"):
    _config.load_config(config_file, ["seed=0.5"])


def test_an_unknown_override_names_the_nearest_key(config_file):
  with pytest.raises(ValueError, match=r"mean `optimizer.learning_rate`\?"):
    _config.load_config(config_file, ["optimizer.learning_rat=1"])
  with pytest.raises(ValueError, match=r"must be `--config.KEY=VALUE`"):
    _config.load_config(config_file, ["seed"])


def test_a_missing_file_or_function_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"there is none at 'nowhere.py'"):
    _config.load_config("nowhere.py")
  empty = tmp_path / "empty.py"
  empty.write_text("")
  with pytest.raises(ValueError, match=r"must define `get_config"):
    _config.load_config(str(empty))


def test_a_section_is_the_keyword_arguments_of_one_call():
  section = _config.Section({"learning_rate": 1e-3})
  assert section.call(optimizer, decay=0.1) == (1e-3, 0.1)
  section.check_all_read()


def test_a_key_that_the_call_does_not_take_names_the_nearest():
  section = _config.Section({"optimizer": {"learnin_rate": 1e-3}})
  message = (
    r"`config.optimizer.learnin_rate` is not a setting of `optimizer`"
    r" \(did you mean `learning_rate`\?\); it takes \['learning_rate', 'decay'"
  )
  with pytest.raises(ValueError, match=message):
    section["optimizer"].call(optimizer)
  with pytest.raises(ValueError, match=r"missing a required .*learning_rate"):
    _config.Section({}).call(optimizer)


def test_a_key_that_nothing_reads_is_an_error():
  section = _config.Section({"seed": 1, "sede": 2, "data": {"frames": 3}})
  assert section["seed"] == 1
  assert section["data"]
  message = r"`config.sede` \(did you mean `seed`\?\), `config.data.frames`"
  with pytest.raises(ValueError, match=message):
    section.check_all_read()


def test_a_missing_key_and_an_unknown_choice_name_what_there_is():
  section = _config.Section({"name": "adan"})
  with pytest.raises(ValueError, match=r"`config.seed` is missing"):
    section["seed"]
  message = r"must be one of \['adam'\]; got 'adan' \(did you mean `adam`"
  with pytest.raises(ValueError, match=message):
    section.choose({"adam": optimizer})


def test_differences_name_each_key_with_both_values():
  old = ml_collections.ConfigDict({"a": {"b": 1, "c": (1, 2)}})
  new = {"a": {"b": 2, "c": [1, 2]}, "d": 3}
  assert _config.differences(old, new) == [
    "`a.b`: 1 -> 2",
    "`d`: 'absent' -> 3",
  ]
  assert _config.config_hash(old) == _config.config_hash(old.to_dict())
  assert _config.config_hash(old) != _config.config_hash(new)

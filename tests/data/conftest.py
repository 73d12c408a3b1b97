import pytest

from crcm_jax import data

TRAIN_CLIPS = 44
TEST_CLIPS = 20


@pytest.fixture(scope="session")
def builder(tmp_path_factory):
  """A small `moving_digits`, prepared once a session."""
  return data.prepare_moving_digits(
    tmp_path_factory.mktemp("data"),
    frames=12,
    train_clips=TRAIN_CLIPS,
    test_clips=TEST_CLIPS,
  )

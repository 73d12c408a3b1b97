"""A state that no device could hold whole is built in its parts."""

import eight_devices


def test_no_device_ever_holds_what_is_split(tmp_path):
  rows = eight_devices.run("placed_state", str(tmp_path))
  assert [row["case"] for row in rows] == ["drawn", "loaded"]
  for row in rows:
    assert row["split"] >= 4, row
    assert row["looked"] >= 6, row
    assert row["whole"] == [], row
    assert row["whole_alone"] > 40, row  # it would have seen them
    assert row["placed"], row
    assert row["same"], row
    assert row["shared"] == 0, row  # the state will be donated
    assert row["narrow"] == "bfloat16", row

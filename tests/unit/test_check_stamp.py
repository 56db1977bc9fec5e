"""A stamp is another one as soon as anything that it depends on is."""

from pathlib import Path

from common.engine.check_stamp import stamp_path


def test_the_stamp_depends_on_model_and_worker(tmp_path: Path) -> None:
    one = stamp_path(tmp_path, ("revision", "float32"))
    assert one == stamp_path(tmp_path, ("revision", "float32"))
    assert one != stamp_path(tmp_path, ("revision", "bfloat16"))
    assert one != stamp_path(tmp_path, ("revisionfloat32", ""))
    assert one.parent.parent == tmp_path

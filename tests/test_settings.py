"""Every setting of a run can be looked up: on its page, in `train --help`, and both are the code's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

from peftree.cli import app, main
from peftree.setting_rows import page, settings
from peftree.settings import DataConfig, MethodConfig, RunConfig

ROOT = Path(__file__).parents[1]


def fields(model: type[BaseModel], prefix: str = "") -> list[tuple[str, Any]]:
    """Return dotted key and pydantic's own field of every setting."""
    inner = {"data": DataConfig, "method": MethodConfig}
    found = []
    for name, info in model.model_fields.items():
        kind = inner.get(name) if not prefix else None
        found += fields(kind, f"{name}.") if kind else [(prefix + name, info)]
    return found


def test_the_page_is_the_code() -> None:
    assert (ROOT / "docs" / "settings.md").read_text("utf-8") == page(), "run `make settings-page`"
    assert "settings.md" in (ROOT / "mkdocs.yml").read_text("utf-8")
    assert "(docs/settings.md)" in (ROOT / "README.md").read_text("utf-8")


def test_every_setting_has_type_default_and_meaning() -> None:
    rows = {row.key: row for row in settings()}
    assert list(rows) == [key for key, _ in fields(RunConfig)] and len(rows) > 35
    for key, info in fields(RunConfig):
        row = rows[key]
        assert info.description and row.meaning == info.description and row.type
        if info.is_required():
            assert row.default == "must be given"
        else:
            value = yaml.safe_load(row.default.replace("none", "null") if row.default == "none" else row.default)
            wanted = info.get_default(call_default_factory=True)
            wanted = None if wanted == "none" else wanted  # a word of `quantize`
            wanted = list(wanted) if isinstance(wanted, tuple) else wanted  # as YAML writes it
            assert value == wanted and type(value) is type(wanted), key


def test_help_of_train_lists_every_setting() -> None:
    shown = CliRunner().invoke(app, ["train", "--help"]).stdout
    for row in settings():
        assert f"  {row.key} = {row.default}  ({row.type})" in shown
        assert " ".join(row.meaning.split()) in " ".join(shown.split())
    assert "accumulation" not in CliRunner().invoke(app, ["eval", "--help"]).stdout


def test_help_needs_no_torch() -> None:
    heavy = "bool({'torch', 'transformers'} & set(sys.modules))"
    code = f"import sys, peftree.setting_rows as s; s.text(); sys.exit({heavy})"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("files", "said"),
    [(["adapter/manifest.json", "resolved.yaml"], "finished run: peftree eval"),
     (["resolved.yaml", "checkpoint-3/x"], "interrupted run: peftree train {}/resolved.yaml resume=true"),
     (["config.json"], "peftree train model={}"), (["train.csv"], "data={}")],
)  # fmt: skip
def test_a_folder_is_told_what_goes_on(
    files: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.setattr(sys, "argv", ["peftree", "train", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert said.format(tmp_path) in capsys.readouterr().err

"""The README is true: its tables are those of the committed results, its commands and links exist."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from zoo.cli import app
from zoo.reporting.tables import headline_markdown

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def _with_tables(text: str) -> str:
    def table(match: re.Match[str]) -> str:
        document = json.loads((ROOT / "benchmarks" / match[2] / "table.json").read_text(encoding="utf-8"))
        return f"{match[1]}{headline_markdown(document)}\n{match[4]}"

    return BLOCK.sub(table, text)


def test_tables_are_those_of_the_committed_results():
    text = README.read_text(encoding="utf-8")
    assert len(BLOCK.findall(text)) == 2
    wanted = _with_tables(text)
    if os.environ.get("ZOO_UPDATE_README"):
        README.write_text(wanted, encoding="utf-8")
    assert README.read_text(encoding="utf-8") == wanted, "run `make readme`"


def _commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if "zoo " in line]


def test_every_command_of_the_readme_parses():
    commands = _commands()
    assert len(commands) >= 10
    for line in commands:
        words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)][1:]
        verb = words[:2] if words[0] == "data" else words[:1]
        shown = CliRunner().invoke(app, [*verb, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
        assert shown.exit_code == 0, line
        for option in (word for word in words if word.startswith("--")):
            assert option in shown.output, f"{line}: {option}"


@pytest.mark.parametrize("file", ["README.md", "recipes/README.md", "models/README.md", "data/README.md"])
def test_every_link_leads_somewhere(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / file).parent.joinpath(target).exists(), target


def test_every_recipe_is_in_the_list_of_recipes():
    listed = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    names = [path.stem for path in (ROOT / "recipes").glob("*.toml")]
    assert len(names) >= 16
    for name in names:
        assert f"| `{name}` |" in listed, name


def test_no_address_of_an_index_and_no_path_of_a_machine_is_committed():
    pattern = re.compile(r"https?://[\w.]*pypi|/work/|/root/|/home/\w+/")
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.txt"), *ROOT.glob("benchmarks/**/*.*")]:
        if path.suffix in (".md", ".toml", ".txt", ".json", ".csv"):
            assert not pattern.search(path.read_text(encoding="utf-8")), path

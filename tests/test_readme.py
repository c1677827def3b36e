"""The documents are true: their tables are those of the committed results, their commands and links exist."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from zoo.cli import app
from zoo.models.carried import carried_weights
from zoo.reporting.contrasts import contrasts_table
from zoo.reporting.tables import headline_markdown

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- (table|contrasts|cards): (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def _table(kind: str, name: str) -> str:
    if kind == "cards":
        return _cards()
    file = ROOT / "benchmarks" / name / f"{kind}.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    return headline_markdown(document) if kind == "table" else contrasts_table(document["contrasts"])


def _cards() -> str:
    heads = ("weights", "MB", "images seen", "crops px", "hours", "format", "held-out top1", "SHA-256")
    rows = [
        (
            f"`{each.name}`",
            f"{each.size_bytes / 1e6:.2f}",
            f"{each.facts['images_seen'] / 1e6:.2f}M",
            ", ".join(map(str, each.facts["settings"]["image_sizes"])),
            f"{each.facts['hours']:.2f}",
            each.facts["precision_plan"]["dtype"],
            f"{each.facts['held_out_top1']:.3f}",
            f"`{each.sha256[:16]}…`",
        )
        for each in carried_weights().values()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


@pytest.mark.parametrize(("name", "blocks"), [("README.md", 2), ("docs/pretraining.md", 2)])
def test_tables_are_those_of_the_committed_results(name, blocks):
    file = ROOT / name
    text = file.read_text(encoding="utf-8")
    assert len(BLOCK.findall(text)) == blocks
    wanted = BLOCK.sub(lambda match: f"{match[1]}{_table(match[2], match[3])}\n{match[5]}", text)
    if os.environ.get("ZOO_UPDATE_README"):
        file.write_text(wanted, encoding="utf-8")
    assert file.read_text(encoding="utf-8") == wanted, "run `make readme`"


def _commands() -> list[str]:
    texts = [file.read_text(encoding="utf-8") for file in (README, *sorted((ROOT / "docs").glob("*.md")))]
    blocks = [block for text in texts for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if "zoo " in line]


@pytest.mark.slow
def test_every_command_of_the_readme_parses():
    commands = _commands()
    assert len(commands) >= 10
    for line in commands:
        words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
        words = words[words.index("zoo") + 1 :]  # what stands before it is torchrun's
        verb = words[:2] if words[0] == "data" else words[:1]
        shown = CliRunner().invoke(app, [*verb, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
        assert shown.exit_code == 0, line
        for option in (word for word in words if word.startswith("--")):
            assert option in shown.output, f"{line}: {option}"


@pytest.mark.parametrize(
    "file",
    [
        "README.md",
        "recipes/README.md",
        "models/README.md",
        "data/README.md",
        "docs/pretraining.md",
        "docs/deployment.md",
        "docs/statistics.md",
        "docs/training.md",
        "benchmarks/perf/README.md",
    ],
)
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

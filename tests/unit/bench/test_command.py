"""`python -m bench`: a part that fails is named and the others are measured; a quick run leaves the page alone."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

from bench import command, models
from bench.plan import Part, Plan, Section, Task
from bench.records import Block, Record, Records, Run, Sample, Subject

TEXT = "".join(f"<!-- measured: {name} -->\nold\n<!-- end of {name} -->\n" for name in ("verdicts", "runs", "a", "b"))


def part(name: str, fails_after: int | None = None) -> Part:
    """Every block has one run, whose rate is its number."""

    def measure(task: Task) -> Generator[Block, None, None]:
        task.note(f"{name} is noted.")
        for number in range(task.plan.blocks):
            if number == fails_after:
                raise OSError(f"{name} is broken")
            yield (Run(Subject("m", "t", ""), Sample(rate=float(number))),)

    return Part(name, lambda plan: 60.0 * plan.blocks, measure)


def section(*parts: Part) -> Section:
    def tables(records: list[Record]) -> str:
        return " ".join(f"{record.part}: {[s.rate for s in record.of('m', 't', '')]}" for record in records)

    return Section(parts[0].name, parts, tables, lambda _: [])


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """a works, b breaks after two blocks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "export", lambda _: None)
    monkeypatch.setattr(command, "SECTIONS", (section(part("a")), section(part("b", fails_after=2))))
    monkeypatch.setattr(command, "_QUICK_PARTS", "a")
    path = Path("docs/benchmarks.md")
    path.parent.mkdir()
    path.write_text(TEXT)
    return path


def test_a_part_that_fails_is_named_and_the_others_are_measured(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--only", "b,a", "--blocks", "3"]) == 1
    text = page.read_text()
    assert "a: [0.0, 1.0, 2.0]" in text
    assert "b: [0.0, 1.0]" in text
    assert "**The last run of b**" in text
    assert "**stopped** after 2 of 3 blocks: OSError: b is broken" in text
    assert "b is broken" in capsys.readouterr().err


def test_one_part_anew(page: Path) -> None:
    """1. Both. 2. One of them: the other stays as it was. 3. Rendered without measuring: the same page."""
    command.main(["--blocks", "3"])
    assert command.main(["--only", "a", "--blocks", "1"]) == 0
    text = page.read_text()
    assert "a: [0.0]" in text
    assert "b: [0.0, 1.0]" in text
    page.write_text(TEXT)
    assert command.main(["--render"]) == 0
    assert page.read_text() == text


def test_a_quick_run_leaves_the_page_and_the_records_alone(page: Path) -> None:
    assert command.main(["--quick"]) == 0
    assert page.read_text() == TEXT
    assert Records(Path("build/bench")).best("a") is None
    assert "a: [0.0]" in Path("build/bench-quick/benchmarks.md").read_text()


def test_an_unknown_part_is_named(page: Path) -> None:
    with pytest.raises(SystemExit, match="expected some of a, b, got c"):
        command.main(["--only", "a,c"])


def test_the_help_tells_how_long_it_takes(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert "10 minutes (a 5.0, b 5.0)" in " ".join(capsys.readouterr().out.split())


def test_interrupted_a_part_keeps_its_blocks(tmp_path: Path) -> None:
    def measure(task: Task) -> Generator[Block, None, None]:
        yield (Run(Subject("m", "t", ""), Sample(rate=1.0)),)
        raise KeyboardInterrupt

    records = Records(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        command.measure(Part("a", lambda _: 0.0, measure), Plan(), tmp_path, records)
    stopped = records.stopped("a")
    assert stopped is not None
    assert (len(stopped.blocks), stopped.wanted) == (1, 5)

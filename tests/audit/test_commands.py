"""`agentloop audit`: what it prints, and its exit status."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from agentloop.audit import INVARIANTS, Finding, Report
from agentloop.batch import to_dataproto
from agentloop.cli import main
from tests.audit.planted import pieces_of, rebuilt, write
from tests.audit.rollouts import Maker
from tests.audit.test_planted_ledgers import NAME, log_prob_nan, step

DOCS = Path(__file__).parents[2] / "docs" / "audit.md"


class Done(NamedTuple):
    returncode: Any
    stdout: str
    stderr: str


Audit = Callable[..., Done]


@pytest.fixture
def audit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """The command, by its entry point, in a folder."""

    def run(folder: Path, *arguments: str) -> Done:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["agentloop", "audit", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Done(ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a good run, a bad one, and a good and a bad batch."""
    folder = tmp_path_factory.mktemp("audit")
    good = list(step())
    write(folder / "runs" / "good", NAME, good)
    write(folder / "runs" / "bad", NAME, log_prob_nan().trajectories)
    batch = to_dataproto(good, prompt_length=320, response_length=1200, pad_token_id=0)
    batch.save_to_disk(folder / "good.pkl")
    batch.batch["response_mask"][3, 0] = 0
    batch.save_to_disk(folder / "bad.pkl")
    return folder


def test_status_and_text(folder: Path, audit: Audit) -> None:
    done = audit(folder, "good")
    assert (done.returncode, done.stderr) == (0, "")
    assert "12 trajectories" in done.stdout
    assert "every invariant holds" in done.stdout
    done = audit(folder, "bad")
    assert done.returncode == 1
    assert re.search(r"log_probs: step 1 of train, trajectory g0_1, turn 1, token \d+ \(\d+ '", done.stdout), done.stdout
    done = audit(folder, "bad", "--json")
    told = json.loads(done.stdout)
    assert (done.returncode, told["ok"], told["counts"]) == (1, False, {"log_probs": 1})
    assert told["findings"][0]["trajectory"] == "g0_1"
    assert told["findings"][0]["token"] == log_prob_nan().token


def test_batches(folder: Path, audit: Audit) -> None:
    assert audit(folder, "good.pkl").returncode == 0
    assert audit(folder, "good.pkl", "--run", "good", "--step", "1", "--estimator", "grpo").returncode == 0
    done = audit(folder, "bad.pkl", "--run", "good", "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 1
    assert [(f["invariant"], f["row"], f["place"], f["turn"]) for f in told["findings"]] == [("mask", 3, 0, 0)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["goood"], "did you mean 'good'?"),
        (["good", "--step", "9"], "no trajectories of step 9; it has steps 1 to 1"),
        (["good", "--partition", "trian"], "did you mean 'train'?"),
        (["good", "--run", "good"], "--run is for a batch, and good is no file"),
        (["good.pkl", "--tokenizer", "x"], "--tokenizer is for a run, and good.pkl is a file"),
        (["good.pkl", "--estimator", "grop"], "did you mean 'grpo'?"),
        (["good.pkl", "--run", "goood"], "did you mean 'good'?"),
        (["runs/good/run.json"], "not readable as a batch"),
    ],
)
def test_wrong_input_is_one_sentence(folder: Path, audit: Audit, arguments: list[str], sentence: str) -> None:
    done = audit(folder, *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_what_a_tool_wrote_cannot_act_on_the_terminal() -> None:
    finding = Finding("mask", "wrong", trajectory="a\x1b[2Jb", text="\u202e\x1b[31m", token=3, token_id=7, expected="\x07")
    shown = Report(findings=[finding], not_checked=["\x1b"]).render()
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", shown)


def test_the_docs_name_every_invariant() -> None:
    told = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", DOCS.read_text(), re.MULTILINE))
    assert told == INVARIANTS


def test_a_tokenizer_renders_anew(folder: Path, audit: Audit, tmp_path: Path) -> None:
    maker = Maker(NAME, 1, plain=True)
    maker.tokenizer.save_pretrained(tmp_path / "tokenizer")
    from tests.chat.templates import TAKEN

    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(TAKEN[NAME][1])
    assert audit(folder, "good", "--tokenizer", str(tmp_path / "tokenizer")).returncode == 0
    good = list(step())
    pieces = pieces_of(good[0])
    at = next(i for i, piece in enumerate(pieces) if piece[0] == "template")
    origin, ids, turn, _ = pieces[at]
    pieces[at] = (origin, [*ids[:-1], ids[-1] + 1], turn, None)
    write(tmp_path / "bad", NAME, [rebuilt(good[0], pieces)])
    done = audit(tmp_path, "bad", "--tokenizer", str(tmp_path / "tokenizer"))
    assert done.returncode == 1
    assert "the renderer writes this otherwise" in done.stdout or "prefix" in done.stdout
    assert audit(folder, "good", "--tokenizer", str(tmp_path / "none")).returncode == 2

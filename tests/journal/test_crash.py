"""A journal survives what happens to its process and its disk."""

from __future__ import annotations

import json
import logging
import random
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from agentloop.errors import ConfigError
from agentloop.journal import JournalError, JournalWriter, NullRecorder, Run
from agentloop.journal.index import Rows
from tests.journal.conversations import conversation, decode, facts

ROOT = Path(__file__).parents[2]
LIMITED_DISK = """
import resource, signal, sys
from agentloop.journal import JournalWriter
from tests.journal.conversations import conversation, decode
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 10**9))
writer = JournalWriter(sys.argv[1], decode=decode)
for seed in range(100):
    conversation(writer, seed)
writer.flush()
print(writer.errors)
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**9, 10**9))
    for seed in range(100, 110):
        conversation(writer, seed)
writer.close()
print(writer.errors)
"""


def run_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def expected(row_id: str, **settings: object) -> dict[str, object]:
    seed = int(row_id.removeprefix("u").split("_")[0])
    return facts(conversation(NullRecorder(), seed, **settings))  # type: ignore[arg-type]


def kill_writers(folder: Path, seed: int, times: int) -> None:
    child = subprocess.run(
        [sys.executable, "-m", "tests.journal.killed", str(folder), str(seed), str(times)],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    within_a_line, torn_off = map(int, child.stdout.split())
    assert within_a_line >= times // 6, "a fifth of them, unless the byte happens to be a line's last"
    assert torn_off, "some trajectories were cut short"


def test_sigkill_loses_nothing_that_was_finished(tmp_path: Path) -> None:
    kill_writers(tmp_path, seed=0, times=12)


@pytest.mark.slow
def test_sigkill_at_50_random_points(tmp_path: Path) -> None:
    kill_writers(tmp_path, seed=1, times=50)


def kill_rollouts(folder: Path, seed: int, times: int) -> None:
    child = subprocess.run(
        [sys.executable, "-m", "tests.journal.rollouts", str(folder), str(seed), str(times)],
        cwd=ROOT, capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) > 0, "some were killed in the middle"


def test_a_rollout_that_is_killed_and_started_again(tmp_path: Path) -> None:
    kill_rollouts(tmp_path, seed=0, times=6)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 7))
def test_a_rollout_that_is_killed_over_and_over(tmp_path: Path, seed: int) -> None:
    kill_rollouts(tmp_path, seed, times=25)


def test_events_torn_at_any_byte(tmp_path: Path) -> None:
    with JournalWriter(tmp_path / "whole", decode=decode) as writer:
        for seed in range(6):
            conversation(writer, seed)
    step = Path("train") / "step_000000"
    data = (tmp_path / "whole" / step / "w0.g1.traj.jsonl").read_bytes()
    ends = [i + 1 for i in range(len(data)) if data[i : i + 1] == b"\n"]
    torn = tmp_path / "torn"
    shutil.copytree(tmp_path / "whole", torn)
    (torn / step / "w0.g1.index.jsonl").unlink()
    for cut in [*random.Random(0).sample(range(1, len(data)), 150), *ends[:40]]:
        (torn / step / "w0.g1.traj.jsonl").write_bytes(data[:cut])
        run = Run(torn)
        rows = list(run.trajectories())
        whole_lines = data[: data.rfind(b"\n", 0, cut) + 1]
        assert sum(row.complete for row in rows) == whole_lines.count(b'"traj_end"')
        for row in rows:
            recorded = run.load(row)
            if row.complete:
                assert facts(recorded.to_trajectory()) == expected(row.id)
        assert [problem.kind for problem in run.verify()] == ([] if cut in ends else ["torn_tail"])


def test_a_writer_that_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    with JournalWriter(tmp_path, generation=1, decode=decode) as writer:
        conversation(writer, 1)
    file = tmp_path / "train" / "step_000000" / "w0.g1.traj.jsonl"
    with file.open("ab") as appended:
        appended.write(b'{"type":"turn","id":"u1')
    with JournalWriter(tmp_path, generation=1, decode=decode) as writer:
        conversation(writer, 2)
    run = Run(tmp_path)
    assert [(row.uid, row.complete) for row in run.trajectories()] == [("u1", True), ("u2", True)]
    assert [problem.kind for problem in run.verify()] == ["bad_line"]
    (tmp_path / "train" / "step_000000" / "w0.g1.index.jsonl").unlink()
    assert [row.uid for row in Run(tmp_path).trajectories()] == ["u1", "u2"]


def test_two_writers_of_one_name_do_not_write_into_each_others_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writers = [JournalWriter(tmp_path, "w0", generation=1, decode=decode) for _ in range(2)]
    for seed in range(30):
        conversation(writers[seed % 2], seed)
        if seed % 3 == 0:
            writers[seed % 2].flush()
    for writer in writers:
        writer.close()
    assert sum(writer.errors for writer in writers) > 0
    assert "another writer of the same name and generation" in caplog.text or "changed by somebody else" in caplog.text
    run = Run(tmp_path)
    assert run.verify() == []
    complete = [row for row in run.trajectories() if row.complete]
    assert complete
    for row in complete:
        assert facts(run.load(row).to_trajectory()) == expected(row.id)


def test_a_damaged_frame_is_reported_and_the_rest_is_readable(tmp_path: Path) -> None:
    with JournalWriter(tmp_path, decode=decode) as writer:
        for seed in range(3):
            conversation(writer, seed)
    events = tmp_path / "train" / "step_000000" / "w0.g1.traj.jsonl"
    tokens = events.with_name("w0.g1.tok")
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    frame = next(line["tok"] for line in lines if line["type"] == "turn" and line["id"] == "u1_1")
    data = bytearray(tokens.read_bytes())
    data[frame["off"] + frame["len"] // 2] ^= 0xFF
    tokens.write_bytes(data)
    run = Run(tmp_path)
    with pytest.raises(JournalError, match=rf"w0\.g1\.tok, offset {frame['off']}: the checksum"):
        run.load("u1_1")
    assert run.load("u1_1", tokens=False).messages[1]["content"].startswith("question 1")
    assert facts(run.load("u2_2").to_trajectory()) == expected("u2_2")
    [problem] = run.verify()
    assert problem.kind == "damaged"
    assert str(frame["off"]) in problem.what


def test_whatever_byte_is_damaged_is_told_and_never_taken_for_what_happened(tmp_path: Path) -> None:
    with JournalWriter(tmp_path, decode=decode, meta={"seed": 1}) as writer:
        told = {trajectory.id: facts(trajectory) for trajectory in (conversation(writer, seed) for seed in range(3))}
    files = list((tmp_path / "train" / "step_000000").iterdir())
    whole = {path: path.read_bytes() for path in files}
    rng = random.Random(0)
    for damage in range(200):
        for path in files:
            path.write_bytes(whole[path])
        path = rng.choice(files)
        data = bytearray(whole[path])
        if damage % 4 == 0:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.randint(1, 3) if data else 0):
            if damage % 2:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            else:
                data[rng.randrange(len(data))] = rng.choice(b'0123456789"{}[],:abcxyz\n \x00\xff')
        path.write_bytes(data)
        run = Run(tmp_path)
        problems = run.verify()
        right = 0
        for row in run.trajectories():
            with suppress(JournalError):
                recorded = run.load(row)
                if row.complete:
                    assert facts(recorded.to_trajectory()) == told[row.id]
                    right += 1
        assert problems or right == 3 or data == whole[path][: len(data)], "what is not there is told"


def test_damaged_texts_of_tokens_are_reported_and_the_conversation_is_readable(tmp_path: Path) -> None:
    with JournalWriter(tmp_path, decode=decode) as writer:
        conversation(writer, 0)
    events = tmp_path / "train" / "step_000000" / "w0.g1.traj.jsonl"
    data = events.read_bytes()
    at = next(place for place in range(data.index(b'"bytes":"') + 9, len(data)) if data[place : place + 1].isalpha())
    events.write_bytes(data[:at] + (b"a" if data[at : at + 1] != b"a" else b"b") + data[at + 1 :])
    run = Run(tmp_path)
    with pytest.raises(JournalError, match=r"the texts of tokens, offset .*: the checksum of a line differs"):
        run.load("u0_0")
    recorded = run.load("u0_0", tokens=False)
    assert recorded.texts == [None] * 3
    assert recorded.messages[3]["content"].startswith("result 0")
    assert {problem.kind for problem in run.verify()} == {"damaged"}


def test_a_lost_token_file_is_reported(tmp_path: Path) -> None:
    with JournalWriter(tmp_path, decode=decode) as writer:
        conversation(writer, 0)
    (tmp_path / "train" / "step_000000" / "w0.g1.tok").unlink()
    assert [problem.kind for problem in Run(tmp_path).verify()] == ["damaged"]


def test_the_index_can_be_rebuilt(tmp_path: Path) -> None:
    with JournalWriter(tmp_path, decode=decode) as writer:
        for seed in range(5):
            conversation(writer, seed)
        conversation(writer, 9, stop_after="observation")
    index = tmp_path / "train" / "step_000000" / "w0.g1.index.jsonl"
    written, rows = index.read_bytes(), list(Run(tmp_path).trajectories())
    for damage in (b"", b"{not json", written[:-40], written.replace(b'"size":', b'"size":9')):
        index.write_bytes(damage)
        assert list(Run(tmp_path).trajectories()) == rows
    index.unlink()
    assert Run(tmp_path).rebuild_indexes() == 1
    assert index.read_bytes() == written


@pytest.mark.parametrize("conversations", [0, 1, 5])
def test_an_index_alone_tells_the_rows(tmp_path: Path, conversations: int) -> None:
    with JournalWriter(tmp_path, decode=decode) as writer:
        for seed in range(conversations):
            conversation(writer, seed)
        conversation(writer, 9, stop_after="turn" if conversations else "reward")
    events = tmp_path / "train" / "step_000000" / "w0.g1.traj.jsonl"
    scanned, loaded = Rows(events), Rows(events)
    scanned.scan()
    scanned.save()
    loaded.load()
    assert list(loaded) == list(scanned)
    assert (loaded.size, loaded.pieces) == (events.stat().st_size, scanned.pieces)
    assert len(loaded) == conversations + 1


@pytest.mark.parametrize("room_again", [False, True])
def test_a_full_disk_does_not_reach_the_caller(tmp_path: Path, room_again: bool) -> None:
    child = run_python(LIMITED_DISK, str(tmp_path), *(["again"] if room_again else []))
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    full, in_all = map(int, out.split())
    assert full > 0
    assert err.count("File too large") == 1, "said once"
    run = Run(tmp_path)
    rows = list(run.trajectories())
    complete = {row.uid for row in rows if row.complete}
    assert "u0" in complete
    assert ({f"u{seed}" for seed in range(100, 110)} <= complete) == room_again
    if room_again:
        assert in_all == full, "nothing went wrong after that"
    for row in rows:
        if row.complete:
            assert facts(run.load(row).to_trajectory()) == expected(row.id)
    assert {problem.kind for problem in run.verify()} <= {"torn_tail", "bad_line"}


@pytest.mark.parametrize("idle", [True, False])
def test_a_removed_folder_does_not_reach_the_caller(tmp_path: Path, caplog: pytest.LogCaptureFixture, idle: bool) -> None:
    with caplog.at_level(logging.ERROR), JournalWriter(tmp_path / "run", decode=decode) as writer:
        conversation(writer, 0)
        conversation(writer, 1, stop_after="turn")
        writer.flush()
        if not idle:  # the files are open when they go
            conversation(writer, 5, stop_after="start")
            while "u5_1" not in {row.id for row in Run(tmp_path / "run").trajectories()}:
                time.sleep(0.001)
        shutil.rmtree(tmp_path / "run")
        conversation(writer, 2)
        conversation(writer, 3)
    assert writer.errors > 0
    assert len([record for record in caplog.records if " removed " in record.message]) == 1
    run = Run(tmp_path / "run")
    assert facts(run.load("u3_3").to_trajectory()) == expected("u3_3")
    assert all(row.complete for row in run.trajectories())


def test_a_file_in_the_way_does_not_reach_the_caller(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with JournalWriter(tmp_path) as writer:
        (tmp_path / "train").write_text("not a folder")
        conversation(writer, 0)
    assert writer.errors > 0
    assert "exists" in caplog.text or "Not a directory" in caplog.text


def test_a_folder_that_cannot_be_written_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="a journal cannot be written here"):
        JournalWriter(tmp_path / "file")
    with pytest.raises(ConfigError, match="only letters"):
        JournalWriter(tmp_path, "w 0")


def test_nothing_waits_for_a_stalled_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stalled = threading.Event()

    def stalling(token_id: int) -> bytes:
        assert stalled.wait(60)
        return decode(token_id)

    writer = JournalWriter(tmp_path, decode=stalling, queue_limit=100)
    told = [conversation(writer, seed) for seed in range(40)]  # returns although nothing can be written
    assert writer.flush(timeout=0.01) is False
    stalled.set()
    writer.close()
    assert "100 events wait already" in caplog.text
    assert writer.errors > 0
    run = Run(tmp_path)
    rows = list(run.trajectories())
    assert 0 < sum(row.complete for row in rows) < len(told)
    for row in rows:
        if row.complete:
            assert facts(run.load(row).to_trajectory()) == expected(row.id)
    assert run.verify() == []


def test_a_tokenizer_that_raises_does_not_reach_the_caller(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def raising(token_id: int) -> bytes:
        raise RuntimeError("no such token")

    with JournalWriter(tmp_path, decode=raising) as writer:
        conversation(writer, 0)
        conversation(writer, 1)
    assert writer.errors > 0
    assert caplog.text.count("RuntimeError('no such token')") == 1
    assert not any(row.complete for row in Run(tmp_path).trajectories())


def test_events_after_close_are_counted(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path)
    writer.close()
    writer.close()
    conversation(writer, 0)
    assert writer.errors > 0
    assert writer.flush()


def test_a_process_that_just_ends_has_written_everything(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom agentloop.journal import JournalWriter\n"
        "from tests.journal.conversations import conversation, decode\n"
        "writer = JournalWriter(sys.argv[1], decode=decode)\n"
        "for seed in range(50): conversation(writer, seed)\n"
    )
    child = run_python(code, str(tmp_path))
    _, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert sum(row.complete for row in Run(tmp_path).trajectories()) == 50

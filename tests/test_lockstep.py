"""Ranks that drift apart, or are in different calls, are named on every rank; nobody hangs."""

import os
import time
from dataclasses import replace

import pytest
from conftest import TINY, run_ranks

from tprt import LLM, SamplingParams
from tprt.engine.control import read_records
from tprt.engine.step_record import Kind
from tprt.errors import ConfigError, OutputError, RankMismatch

PROMPTS = ["human: Reverse: lamp canoe frog cheese\n\nadept:", "human: Repeat: key door\n\nadept:"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


def open_tiny(**settings) -> LLM:
    return LLM(str(TINY), dtype="float32", kv_cache_memory=2**24, **settings)


def damage(llm: LLM, what: str, at_step: int) -> None:
    """Let this rank go wrong in memory before one of its steps."""
    runner, steps = llm._engine.runner, iter(range(10**6))
    execute = runner.execute

    def broken(record, checksum):
        if next(steps) == at_step:
            if what == "token":
                runner.state.last_tokens[0] += 1
            elif what == "block table":
                runner.state.block_tables[0, 0] += 5
            elif what == "record":
                record.tokens = record.tokens.copy()
                record.tokens[:] = 70
            elif what == "checksum":
                checksum += 1
        return execute(record, checksum)

    runner.execute = broken


def _drift(what: str, look_ahead: int, checked: bool) -> list[str]:
    if not checked:
        import tprt.engine.step_result as step_result

        step_result.check_digests = lambda step, digests: None
    with open_tiny(look_ahead=look_ahead) as llm:
        if what and os.environ["RANK"] == "1":
            damage(llm, what, at_step=3)
        try:
            return [out.outputs[0].text for out in llm.generate(PROMPTS, GREEDY)]
        except RankMismatch as error:
            with pytest.raises(RankMismatch):
                llm.generate(PROMPTS, GREEDY)
            return [str(error.exit_code), error.what]


@pytest.mark.parametrize(
    "what, field, look_ahead",
    [
        ("token", "token ids", 1),  # without look-ahead no token stays on the device
        ("block table", "block tables", 0),
        ("block table", "block tables", 1),
        ("record", "token ids", 0),
        ("checksum", "record", 1),
    ],
)
def test_a_rank_that_drifts_is_a_mismatch_on_every_rank(what, field, look_ahead):
    for code, said in run_ranks(_drift, 2, what, look_ahead, True):
        assert code == "7"
        # records are counted from the CALL, so the fourth step is record 4
        assert f"ranks 0 and 1 disagree on the {field} of step 4: " in said
        mine, theirs = said.split(": ")[1].split(" and ")
        assert len(mine) == len(theirs) == 16 and mine != theirs


def test_without_the_check_the_text_is_wrong():
    """The negative control: the damage of the test above does change the answer."""
    right = run_ranks(_drift, 2, "", 1, True)[0]
    wrong = run_ranks(_drift, 2, "block table", 1, False)[0]
    assert right[0].split() == ["cheese", "frog", "canoe", "lamp"]
    assert wrong != right


def _different_calls() -> tuple[str, list[str]]:
    rank = int(os.environ["RANK"])
    with open_tiny() as llm:
        with pytest.raises(RankMismatch) as caught:
            llm.score([[5, 6, 7]]) if rank else llm.generate(PROMPTS, GREEDY)
        return caught.value.what, [o.outputs[0].text for o in llm.generate(PROMPTS, GREEDY)]


def test_ranks_in_different_calls_are_named_and_can_go_on():
    for said, texts in run_ranks(_different_calls, 2):
        assert said == "rank 0 is in generate() and rank 1 in score()"
        assert texts[0].split() == ["cheese", "frog", "canoe", "lamp"]


def _calls() -> dict:
    rank = int(os.environ["RANK"])
    with open_tiny() as llm:
        events = list(llm.stream(PROMPTS if rank == 0 else None, GREEDY))
        return {
            "events": [(e.request_id, e.text) for e in events],
            "scores": llm.score([[80, 81, 82], [90, 91]] if rank == 0 else None),
            "logits": llm.logits([80, 81, 82]).log_softmax(1)[[0, 1], [81, 82]].tolist(),
            "logprobs": [
                [next(iter(entry.values())).logprob for entry in out.outputs[0].logprobs]
                for out in llm.generate(PROMPTS, SamplingParams(max_tokens=3, seed=1, logprobs=2))
            ],
        }


def test_calls_give_the_same_on_every_rank_and_at_every_size():
    (alone,) = run_ranks(_calls, 1)
    first, second = run_ranks(_calls, 2)
    assert second.pop("events") == [] and first["events"]
    joined = ["".join(text for i, text in first["events"] if i == k).split() for k in (0, 1)]
    assert joined == [["cheese", "frog", "canoe", "lamp"], ["key", "door"]]
    assert alone["events"] == first.pop("events")
    assert first == second
    for name in ("scores", "logprobs"):
        flat = [x for row in first[name] for x in row if x is not None]
        assert flat == pytest.approx(
            [x for row in alone[name] for x in row if x is not None], abs=2e-4
        )
    assert first["scores"][0][1:] == pytest.approx(first["logits"], abs=1e-5)
    assert first["scores"][0][0] is None and len(first["scores"][1]) == 2


def _followed() -> list:
    rank = int(os.environ["RANK"])
    with open_tiny() as llm:
        if rank:
            llm.follow()
            return []
        texts = [out.outputs[0].text for out in llm.generate(PROMPTS, GREEDY)]
        with pytest.raises(Exception, match="more than"):
            llm.generate(["x"], SamplingParams(max_tokens=10**6))
        first = llm.add_request(PROMPTS[0], GREEDY)
        dropped = llm.add_request(PROMPTS[1], GREEDY)
        found, steps = {first: "", dropped: ""}, 0
        while events := llm.step() or steps < 3:
            for event in events if isinstance(events, list) else []:
                found[event.request_id] += event.text
            steps += 1
            if steps == 2:
                (last,) = llm.abort(dropped)
                assert last.finish_reason == "abort"
        assert llm.step() == [] and llm.abort(dropped) == []
        assert found[first] == texts[0]
        return [*texts, llm.score([[80, 81]])[0][0]]


def test_follow_serves_every_call_until_rank_0_closes():
    texts, nothing = run_ranks(_followed, 2)
    assert nothing == []
    assert [t.split() for t in texts[:2]] == [["cheese", "frog", "canoe", "lamp"], ["key", "door"]]


def _record(path: str) -> list[list[int]]:
    settings = {"record_path": path, "max_num_batched_tokens": 16, "block_size": 4}
    mixed = [SamplingParams(seed=1, max_tokens=9, n=2), SamplingParams(temperature=0.0)]
    with open_tiny(**settings) as llm:
        outputs = [*llm.generate(PROMPTS, mixed), *llm.generate(PROMPTS[:1], GREEDY)]
        llm.score([[80, 81, 82]])
        return [c.token_ids for out in outputs for c in out.outputs]


def _replay(path: str) -> list:
    with open_tiny(block_size=4) as llm:
        calls = llm.replay(path)
        after = llm.generate(PROMPTS[1], GREEDY)[0].outputs[0].text
        return [[(call.name, call.tokens, call.differences) for call in calls], after]


@pytest.mark.parametrize("recorded, replayed", [(1, 1), (2, 2), (2, 1), (1, 4)])
def test_a_record_file_runs_again(tmp_path, recorded, replayed):
    path = str(tmp_path / "run.tprtrec")
    wanted = run_ranks(_record, recorded, path)[0]
    results = run_ranks(_replay, replayed, path)
    assert all(calls == [] for calls, _ in results[1:])
    assert all(after.split() == ["key", "door"] for _, after in results)
    calls = results[0][0]
    assert [(name, differences) for name, _, differences in calls] == [
        ("generate", []), ("generate", []), ("score", []),
    ]  # fmt: skip
    drawn = [ids for _, tokens, _ in calls for _, ids in sorted(tokens.items())]
    assert [ids[: len(w)] for ids, w in zip(drawn, wanted, strict=True)] == wanted


def test_a_record_file_is_not_trusted(tmp_path):
    path = tmp_path / "run.tprtrec"
    _record(str(path))
    data = path.read_bytes()
    with open_tiny(block_size=4) as llm:
        whole = llm.replay(path)
        path.write_bytes(data[: len(data) * 2 // 3])  # as a killed job leaves it
        cut = llm.replay(path)
        first = whole[0].tokens
        assert {k: ids[: len(first[k])] for k, ids in cut[0].tokens.items()} == {
            k: first[k][: len(ids)] for k, ids in cut[0].tokens.items()
        }
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        with pytest.raises(ConfigError, match="damaged"):
            llm.replay(path)
        path.write_bytes(b"no records at all, but long enough to look like a header" * 20)
        with pytest.raises(ConfigError, match="not a step record"):
            llm.replay(path)
        with pytest.raises(ConfigError, match="cannot be read"):
            llm.replay(tmp_path / "missing")
        path.write_bytes(data)
        assert not any(call.differences for call in llm.replay(path))
    with open_tiny(block_size=8) as llm, pytest.raises(ConfigError, match="block_size 4"):
        llm.replay(path)
    with open_tiny(block_size=4, max_num_seqs=1) as llm, pytest.raises(ConfigError, match="slot"):
        llm.replay(path)


def test_hostile_records_stay_inside_memory(tmp_path):
    """Every number of a step, replaced by one out of range, is refused before it indexes anything."""
    path = tmp_path / "run.tprtrec"
    _record(str(path))
    with path.open("rb") as file:
        records = list(read_records(file, "run"))
    steps = [i for i, record in enumerate(records) if record.kind == Kind.STEP]
    tried = 0
    with open_tiny(block_size=4) as llm:
        for at in steps[:4]:
            for name in ("rows", "tokens", "blocks", "copies", "bans", "targets"):
                section = getattr(records[at], name)
                for place in range(min(section.size, 6)):
                    if name == "rows" and place % 4 >= 2:
                        continue  # counts and flags: checked with the layout
                    wrong = section.copy()
                    wrong.reshape(-1)[place] = 10**9
                    hostile = [*records[:at], replace(records[at], **{name: wrong})]
                    path.write_bytes(b"".join(record.encode().tobytes() for record in hostile))
                    with pytest.raises(ConfigError, match="this engine has"):
                        llm.replay(path)
                    tried += 1
    assert tried > 30


def test_what_is_no_record_file_is_said(tmp_path):
    path = tmp_path / "run.tprtrec"
    _record(str(path))
    with path.open("rb") as file:
        records = list(read_records(file, "run"))
    with open_tiny(block_size=4, max_num_batched_tokens=16) as llm:
        for content in (b"", b"x" * 100):
            path.write_bytes(content)
            with pytest.raises(ConfigError, match="no record file"):
                llm.replay(path)
        bad_text = replace(records[0], text=b"\xff\xfe")
        path.write_bytes(bad_text.encode().tobytes())
        with pytest.raises(ConfigError, match="no JSON"):
            llm.replay(path)
        begun = next(i for i, r in enumerate(records) if len(r.options))
        orphan = replace(records[begun], options=records[begun].options[:0])
        path.write_bytes(b"".join(r.encode().tobytes() for r in [*records[:begun], orphan]))
        with pytest.raises(ConfigError, match="no step before it began"):
            llm.replay(path)


def test_the_file_that_is_being_written_is_not_replayed(tmp_path):
    path = str(tmp_path / "run.tprtrec")
    with open_tiny(record_path=path) as llm:
        llm.generate("human: hi\n\nadept:", SamplingParams(max_tokens=2))
        with pytest.raises(ConfigError, match="records to"):
            llm.replay(path)


def test_a_record_file_that_cannot_be_written_is_an_output_error():
    llm = open_tiny(record_path="/dev/full")
    with pytest.raises(OutputError, match="No space"):
        for _ in range(200):  # until the buffer is full
            llm.generate("human: hi\n\nadept:", SamplingParams(max_tokens=4))
    with pytest.raises(OutputError):
        llm.close()
    llm.close()


class Mine(Exception):
    pass


def _interrupted() -> list:
    """Rank 0 is interrupted in the middle of a step; what its next calls, and the other rank, see."""
    with open_tiny() as llm:
        if llm.tp.rank == 0:
            llm._engine.runner.execute = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        seen = []
        for _ in range(2):
            try:
                llm.generate("human: hi\n\nadept:", SamplingParams(max_tokens=4))
            except BaseException as error:
                seen.append(type(error).__name__)
                if llm.tp.rank == 0 and len(seen) == 2:
                    break
        return seen


def test_after_an_interrupt_the_next_call_raises_and_nobody_waits():
    started = time.monotonic()
    seen = run_ranks(_interrupted, 2)
    assert seen[0] == ["KeyboardInterrupt", "RankMismatch"]
    assert seen[1][0] == "PeerLost"
    assert time.monotonic() - started < 60


def test_a_file_cut_off_in_a_call_says_so(tmp_path, monkeypatch):
    path, said = tmp_path / "run.tprtrec", []
    monkeypatch.setattr("tprt.llm.llm.logger.warning", lambda *parts: said.append(parts[0]))
    _record(str(path))
    with open_tiny(block_size=4, max_num_batched_tokens=16) as llm:
        assert all(call.finished for call in llm.replay(path)) and not said
        path.write_bytes(path.read_bytes()[:-1])
        assert not llm.replay(path)[-1].finished
        assert any("ends in the middle of" in text for text in said)


def test_a_loop_of_steps_ends_when_nothing_is_unfinished():
    prompt, params = "human: Reverse: lamp canoe\n\nadept:", SamplingParams(max_tokens=9, seed=1)
    with open_tiny() as llm:
        wanted = llm.generate(prompt, params)[0].outputs[0].text
        assert not llm.has_unfinished_requests()
        llm.add_request(prompt, params)
        text = ""
        while llm.has_unfinished_requests():
            text += "".join(event.text for event in llm.step())
        assert text == wanted


def test_errors_of_the_caller_stay_their_own():
    def fails(finished: int, tokens: int) -> None:
        raise Mine

    with open_tiny() as llm:
        prompt, params = (
            "human: Reverse: lamp canoe\n\nadept:",
            SamplingParams(max_tokens=9, seed=1),
        )
        wanted = llm.generate(prompt, params)[0].outputs[0].token_ids
        with pytest.raises(Mine):
            llm.generate(prompt, params, progress=fails)
        execute, llm._engine.runner.execute = llm._engine.runner.execute, fails
        llm.add_request(prompt, params)
        with pytest.raises(Mine):
            llm.step()
        assert llm.step() == []
        llm._engine.runner.execute = execute
        assert llm.generate(prompt, params)[0].outputs[0].token_ids == wanted
        llm.add_request(prompt, params)
        events = []
        while not any(event.finish_reason for event in events):
            events += llm.step()
        assert [i for event in events for i in event.token_ids] == wanted

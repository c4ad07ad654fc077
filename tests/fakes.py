"""A model and a tokenizer small enough to drive the engine in milliseconds.

``HashModel`` keeps token ids where a model keeps keys, reads them back through the block tables, and
draws its logits from a hash of all of them: one wrong, stale or missing position changes everything
after it.
"""

from types import SimpleNamespace

import torch

from tprt.cache.kv_cache import PagedKVSpec
from tprt.config import EngineConfig
from tprt.distributed.tp_group import TPGroup
from tprt.distributed.vocabulary import Vocabulary
from tprt.engine.llm_engine import LLMEngine
from tprt.engine.model_runner import ModelRunner
from tprt.kernels.reference import ReferenceKernels

EOD = 256
VOCAB = 257


class ByteTokenizer:
    """Ids 0 to 255 are bytes, 256 ends a text."""

    eod_id = EOD
    end_ids = frozenset({EOD})
    special_ids = frozenset([EOD])
    adds_dummy_prefix = removes_extra_whitespace = False
    bos_policy = "none"
    turn_markers = ()

    def encode(self, text, add_bos=None):
        return list(text.encode())

    def decode(self, ids):
        from tprt.tokenizer import Detokenizer

        detokenizer = Detokenizer(self)
        return detokenizer.push(ids) + detokenizer.finish()

    def id_to_piece(self, token_id):
        return "|ENDOFTEXT|" if token_id == EOD else f"<0x{token_id:02X}>"

    def is_byte(self, token_id):
        return token_id != EOD

    def token_bytes(self, token_id):
        return b"|ENDOFTEXT|" if token_id == EOD else bytes([token_id])


class HashModel:
    """Args:
    script: completion after completion, the token that is all but certain at each position of a
        sequence whose first token is its key; positions not scripted follow the hash.
    broken: a first token whose logits are NaN from its second position on.
    """

    def __init__(self, script=None, broken=None, vocab=VOCAB):
        self.config, self.vocabulary = SimpleNamespace(vocab_size=vocab), Vocabulary(vocab)
        self.script, self.broken = script or {}, broken
        self.passes = 0

    def cache_spec(self):
        return [PagedKVSpec(1, 1)]

    def __call__(self, batch, caches):
        self.passes += 1
        memory = caches[0].kv.view(-1)
        memory[batch.paged.slot_mapping[0]] = batch.input_ids.to(memory.dtype)
        size = caches[0].k.shape[1]
        histories, row = [], 0
        for i, new in enumerate(batch.query_lens):
            old = int(batch.positions[row])
            places = batch.paged.block_tables[i].repeat_interleave(size) * 2 * size
            places = places + torch.arange(len(places)) % size
            ids = memory[places[: old + new]].long().tolist()
            histories += [ids[: old + k + 1] for k in range(new)]
            row += new
        wanted = range(row) if batch.logits_rows is None else batch.logits_rows.tolist()
        self.histories = [histories[i] for i in wanted]
        return torch.arange(len(self.histories))

    def compute_logits(self, hidden):
        return torch.stack([self._row(self.histories[i]) for i in hidden.tolist()])

    def argmax(self, hidden, noise, num_valid):
        logits = self.compute_logits(hidden)
        return ReferenceKernels().argmax(logits, noise, torch.arange(logits.shape[1]), num_valid)

    def _row(self, ids):
        generator = torch.Generator().manual_seed(hash(tuple(ids)) % 2**62)
        logits = torch.randn(self.config.vocab_size, generator=generator)
        script = self.script.get(ids[0])
        if script is not None and len(ids) - 1 < len(script):
            logits[script[len(ids) - 1]] = 60.0
        if self.broken == ids[0] and len(ids) > 1:
            logits[:] = float("nan")
        return logits


def fake_engine(model=None, blocks=64, max_model_len=200, **settings) -> LLMEngine:
    config = EngineConfig(dtype="float32", **{"block_size": 4, "max_num_seqs": 8, **settings})
    model = model or HashModel()
    runner = ModelRunner(
        model,
        TPGroup(),
        torch.float32,
        num_blocks=blocks + 1,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        num_valid=model.config.vocab_size,
        enforce_eager=config.enforce_eager,
    )
    runner.capture()
    return LLMEngine(runner, ByteTokenizer(), config, blocks + 1, TPGroup())

"""The token embedding on the host tier: where it lies, what it saves, and that no answer changes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fake_cuda
import pytest
import tiny_checkpoints
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from moepic_core import assembly
from moepic_core.checkpoint import read_spec
from moepic_core.embedding_rows import EmbeddingRows, FileRows, RamRows
from moepic_core.engine import Engine
from moepic_core.errors import BadCheckpoint
from moepic_core.events import Done
from moepic_core.hf import embedding as hf_embedding
from moepic_core.hf.embedding import HostEmbedding, divert, embedding_of
from moepic_core.hf.text import Sampling
from moepic_core.safetensors_header import read_header
from moepic_core.spec import Settings
from moepic_core.transfer.cuda import CudaTransfer

LINKS = ("emulated:16GB/s", "disk")
PROMPT = [3 + (31 * place) % 300 for place in range(24)]
TABLE = "model.embed_tokens.weight"
UNTIED, TIED = "qwen3_moe", "lfm2_moe"
Load = Callable[..., Engine]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    engines: list[Engine] = []

    def make(folder: Path, link: str, **settings: object) -> Engine:
        fixed = {"device": "cpu", "context_length": 96, "packed_dir": str(tmp_path / "packed"), "prefill_chunk": 16}
        engines.append(Engine.load(Settings.create(checkpoint=str(folder), link=link, **{**fixed, **settings})))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def folder(checkpoints: Callable[..., Path], tmp_path: Path) -> Path:
    """An untied checkpoint that a test may harm."""
    return Path(shutil.copytree(checkpoints(UNTIED), tmp_path / "own"))


def logits_of(engine: Engine) -> torch.Tensor:
    """Of a prompt and two tokens."""
    found = []
    for ids in (PROMPT, [0], [319]):
        engine.residency.begin_pass(len(ids))
        found.append(engine.hf.forward(ids, all_logits=True))
        engine.residency.end_pass()
    engine.hf.forget()
    return torch.cat(found)


def reply(engine: Engine) -> tuple[int, ...]:
    done = list(engine.generate(PROMPT, Sampling(max_new_tokens=8, ignore_eos=True)))[-1]
    assert isinstance(done, Done)
    return done.token_ids


def skeleton(folder: Path, **changes: object) -> nn.Module:
    config = AutoConfig.from_pretrained(folder, **changes)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # stored as float32
def test_an_untied_table_leaves_the_device_and_no_bit_of_the_answer_changes(
    link: str, dtype: str, checkpoints: Callable[..., Path], load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_host = load(checkpoints(UNTIED), link, dtype=dtype)
    table_bytes = tiny_checkpoints.VOCAB * 32 * (4 if dtype == "float32" else 2)
    spec = read_spec(checkpoints(UNTIED), dtype)
    assert on_host.spec == spec
    assert spec.embedding_bytes == table_bytes
    assert isinstance(on_host.hf.embedding, HostEmbedding)
    assert isinstance(on_host.hf.embedding.rows, FileRows if link == "disk" else RamRows)
    assert not list(on_host.hf.embedding.parameters())
    assert not on_host.notices

    monkeypatch.setattr(hf_embedding, "_lookup_of", lambda model: None)
    on_device = load(checkpoints(UNTIED), link, dtype=dtype)
    assert on_device.hf.embedding is None
    assert torch.equal(logits_of(on_host), logits_of(on_device))
    assert reply(on_host) == reply(on_device)

    saved = on_device.needs.resident - on_host.needs.resident
    assert saved == table_bytes
    assert on_device.needs.smallest - on_host.needs.smallest == table_bytes
    assert on_host.residency.arena.bytes_by_kind["resident"] == on_host.needs.resident
    assert (on_device.spec.embedding_bytes, on_device.spec.resident_bytes) == (0, spec.resident_bytes + table_bytes)
    assert "stays on the device" in on_device.notices[0]
    on_host.check()


@pytest.mark.parametrize("link", LINKS)
def test_a_tied_table_stays_on_the_device(link: str, checkpoints: Callable[..., Path], load: Load) -> None:
    engine = load(checkpoints(TIED), link)
    assert engine.hf.embedding is None
    assert (engine.spec.token_tables, engine.spec.embedding_bytes) == ((), 0)
    assert not engine.notices
    assert engine.spec.host_bytes == engine.spec.expert_bytes
    weights = dict(engine.hf.model.named_parameters())
    assert engine.needs.resident >= engine.spec.resident_bytes >= weights[TABLE].nbytes


def test_headers_and_loading_agree_for_every_family(checkpoints: Callable[..., Path]) -> None:
    """What `inspect` says from headers is what the model's code allows."""
    on_host = []
    for family in tiny_checkpoints.FAMILIES:
        model, spec = skeleton(checkpoints(family)), read_spec(checkpoints(family))
        divert(model, spec)
        assert (embedding_of(model) is not None) == bool(spec.token_tables), family
        assert bool(spec.token_tables) is not model.config.tie_word_embeddings, family
        on_host += [family] * bool(spec.token_tables)
    assert len(on_host) >= len(tiny_checkpoints.FAMILIES) - 2


def test_only_a_plain_lookup_that_nothing_else_uses_is_diverted(checkpoints: Callable[..., Path]) -> None:
    class Scaled(nn.Embedding):
        pass

    def diverted(change: Callable[[nn.Module], object], **config: object) -> bool:
        model = skeleton(checkpoints(UNTIED), **config)
        change(model)
        divert(model, read_spec(checkpoints(UNTIED)))
        return embedding_of(model) is not None

    def shared(model: nn.Module) -> None:
        model.lm_head.weight = model.get_input_embeddings().weight

    assert diverted(lambda model: None)
    assert not diverted(lambda model: None, tie_word_embeddings=True)
    assert not diverted(lambda model: setattr(model.get_input_embeddings(), "max_norm", 1.0))
    assert not diverted(lambda model: model.set_input_embeddings(Scaled(320, 32, device="meta")))
    assert not diverted(lambda model: model.set_input_embeddings(nn.Embedding(320, 16, device="meta")))
    assert not diverted(lambda model: setattr(model, "second", model.get_input_embeddings()))
    assert not diverted(shared)


def test_over_a_simulated_device(checkpoints: Callable[..., Path], load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = reply(load(checkpoints(UNTIED), LINKS[0], split=0.4))
    device = fake_cuda.install(monkeypatch, bytes_per_s=100e6, lockstep=True)
    monkeypatch.setattr(assembly, "_transfer", lambda link, where: CudaTransfer(where, 4096))
    engine = load(checkpoints(UNTIED), LINKS[0], split=0.4)
    assert engine.hf.embedding is not None
    assert reply(engine) == expected
    engine.close()
    device.stop()


@pytest.mark.parametrize("link", LINKS)
def test_ids_of_a_pass_are_not_read_back(
    link: str, checkpoints: Callable[..., Path], load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading them from a GPU would wait for it. Ids that nobody has announced are read."""
    engine = load(checkpoints(UNTIED), link)
    embedding = engine.hf.embedding
    assert embedding is not None
    table = load_file(checkpoints(UNTIED) / "model.safetensors")[TABLE]
    assert torch.equal(embedding(torch.tensor([[5, 0], [319, 5]])).flatten(0, 1), table[[5, 0, 319, 5]])

    def refuse(tensor: torch.Tensor) -> object:
        raise AssertionError("read back")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", refuse)
        with pytest.raises(AssertionError, match="read back"):
            embedding(torch.tensor([5]))
        ids = torch.tensor([[5, 6]])
        embedding.expect(ids, [5, 6])
        assert torch.equal(embedding(ids)[0], table[[5, 6]])
    seen: list[bool] = []
    gather = embedding.forward

    def watched(input_ids: torch.Tensor) -> torch.Tensor:
        assert embedding._expected is not None
        seen.append(embedding._expected[0] is input_ids)
        return gather(input_ids)

    monkeypatch.setattr(embedding, "forward", watched)
    logits_of(engine)
    assert seen == [True] * 3


# From here on: the rows alone.


@pytest.fixture(params=["ram", "file"])
def rows(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[EmbeddingRows, torch.Tensor]]:
    """Rows in bfloat16 of a table in float32, and the table as it would be loaded."""
    table = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    save_file({"before": torch.ones(3), "table": table}, tmp_path / "t.safetensors")
    loaded = table.to(torch.bfloat16)
    rows: EmbeddingRows = RamRows(loaded, pinned=False)
    if request.param == "file":
        rows = FileRows(read_header(tmp_path / "t.safetensors")["table"], torch.float32, torch.bfloat16)
    yield rows, loaded
    rows.close()


@pytest.mark.parametrize("ids", [[0], [49], [7, 7, 7], [49, 0, 48, 0, 1], list(range(50))[::-1]])
def test_rows_are_those_of_the_loaded_table(ids: list[int], rows: tuple[EmbeddingRows, torch.Tensor]) -> None:
    gathered = rows[0].gather(ids)
    assert gathered.dtype == torch.bfloat16
    assert torch.equal(gathered, rows[1][ids])
    gathered.zero_()
    assert torch.equal(rows[0].gather(ids), rows[1][ids])


@pytest.mark.parametrize("ids", [[50], [-1], [3, 50, 4], [0, -7]])
def test_an_id_outside_the_table_is_the_same_error_as_torchs(
    ids: list[int], rows: tuple[EmbeddingRows, torch.Tensor]
) -> None:
    with pytest.raises(IndexError, match="index out of range"):
        nn.functional.embedding(torch.tensor(ids), rows[1])
    with pytest.raises(IndexError, match="index out of range"):
        rows[0].gather(ids)


def test_a_checkpoint_that_is_replaced_or_deleted_does_not_matter_while_its_model_is_loaded(
    folder: Path, load: Load
) -> None:
    engine = load(folder, "disk")
    expected, file = reply(engine), folder / "model.safetensors"
    tiny_checkpoints.make_model(UNTIED, seed=1).save_pretrained(folder / "next")
    os.replace(folder / "next" / file.name, file)
    assert reply(engine) == expected
    file.unlink()
    assert reply(engine) == expected


@pytest.mark.parametrize("length", ["same", "shorter"])
def test_a_checkpoint_that_is_overwritten_in_place_ends_the_reply_with_one_sentence(
    length: str, folder: Path, load: Load
) -> None:
    engine, file = load(folder, "disk"), folder / "model.safetensors"
    reply(engine)
    with file.open("r+b") as writer:
        if length == "shorter":
            writer.truncate(1000)
        else:
            writer.write(bytes(file.stat().st_size))
    with pytest.raises(BadCheckpoint, match=r"model\.safetensors .*overwritten.*load the model again$"):
        reply(engine)
    engine.check()


def test_a_file_that_cannot_be_read_is_one_sentence(folder: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(folder, "disk")

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("moepic_core.embedding_rows.os.preadv", fail)
        with pytest.raises(BadCheckpoint, match="cannot be read: Input/output error"):
            engine.hf.embedding.rows.gather([1])
    engine.check()


@pytest.mark.parametrize(
    ("config", "tables"),
    [
        ({}, 2),
        ({"tie_word_embeddings": True}, 0),
        ({"tie_word_embeddings": None}, 0),  # silence
        ({"tie_word_embeddings": "no"}, 0),
        ({"text_config": {"tie_word_embeddings": True}}, 0),  # the parts disagree
        ({"tie_word_embeddings": None, "text_config": {"tie_word_embeddings": False}}, 2),
    ],
)
def test_what_headers_and_config_say(config: dict[str, object], tables: int, folder: Path) -> None:
    path = folder / "config.json"
    before = read_spec(folder)
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    spec = read_spec(folder)
    assert len(spec.token_tables) == tables
    assert spec.resident_bytes + spec.embedding_bytes == before.resident_bytes + before.embedding_bytes


def test_a_third_table_of_the_size_keeps_all_on_the_device(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.9.embed_tokens.weight"] = tensors[TABLE].clone()  # of a layer that is never loaded
    save_file(tensors, file)
    assert read_spec(folder).token_tables == ("lm_head.weight", TABLE)
    tensors["model.second_embed_tokens.weight"] = tensors[TABLE].clone()
    save_file(tensors, file)
    assert read_spec(folder).token_tables == ()

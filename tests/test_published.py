"""MiniGPT-4, Ziya-Visual and VisCPM-Chat from files of the layout in which they were published: against the original formulas, through
`suture convert`, and their parts through levels 1 to 3."""

import shutil
from pathlib import Path

import image_text
import published
import pytest
import torch
from image_text_levels import check_levels
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from suture.core.cpm_inputs import LAYOUT, made_up
from suture.core.errors import UserError
from suture.export.options import ExportOptions
from suture.export.stage import export
from suture.models.architectures import load_model, open_checkpoint
from suture.models.convert import main as convert
from suture.models.parts import parts_of

NAMES, LANGUAGE = tuple(published.CONFIGS), "language_model."
LLAMA = {"Attention": 2, "RMSNormalization": 5, "RotaryEmbedding": 4, "Swish": 2, "TensorScatter": 4}
FUSED = {
    "minigpt4": {
        # two blocks and ln_vision; the Q-Former's first norm, three after a layer with cross-attention and two after one without
        "vision": {"Attention": 2 + 3, "LayerNormalization": 5 + 6, "Gelu": 2 + 2},
        "decoder": LLAMA,
    },
    "ziya_visual": {
        # and a feed-forward with its norm for the instruction, in the last layer, too, where transformers drops what comes of it
        "vision": {"Attention": 2 + 3, "LayerNormalization": 5 + 6 + 2, "Gelu": 2 + 2 + 2},
        "decoder": LLAMA,
    },
    "viscpm": {
        # four norms of each of two kinds in a layer; nothing reads the patches after the last attention
        "vision": {"Attention": 2, "LayerNormalization": 8 + 5 + 1, "Gelu": 2 + 1 + 1},
        "decoder": {"Attention": 2, "RMSNormalization": 5, "Gelu": 2, "TensorScatter": 4},
    },
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    """transformers' BLIP-2 and InstructBLIP with a LLaMA inside, whose weights the pieces have."""
    made = tmp_path_factory.mktemp("transformers")
    image_text.write_checkpoint("blip-2", made / "blip-2", {"text_config": published.CONFIGS["minigpt4"]["text_config"]})
    image_text.write_checkpoint("instructblip", made / "instructblip")
    return made


@pytest.fixture(scope="module")
def checkpoints(theirs, tmp_path_factory):
    """Folders as somebody makes them of what was published."""
    makers, out = {"minigpt4": minigpt4, "ziya_visual": ziya_visual, "viscpm": viscpm}, tmp_path_factory.mktemp("published")

    def checkpoint(name: str) -> Path:
        folder = out / name
        if not folder.exists():
            published.write_config(name, folder)
            makers[name](folder, theirs)
        return folder

    return checkpoint


def minigpt4(folder: Path, theirs: Path) -> None:
    weights = in_pieces(theirs / "blip-2", folder)
    linear = {
        name.replace("language_projection", "llama_proj"): weights[name] for name in weights if name.startswith("language_")
    }
    files = {
        "eva_vit_g": published.eva_vit(),
        "blip2_pretrained_flant5xxl": {"model": q_former(weights)},
        "prerained_minigpt4_7b": {"model": linear, "optimizer": {"state": {}}},
    }
    for name, content in files.items():
        torch.save(content, folder / f"{name}.pth")
        convert([str(folder / f"{name}.pth"), str(folder / f"{name}.safetensors")])


def ziya_visual(folder: Path, theirs: Path) -> None:
    save_file(in_pieces(theirs / "instructblip", folder), folder / "visual.safetensors")


def viscpm(folder: Path, theirs: Path) -> None:
    torch.save(published.viscpm(), folder / "pytorch_model.v1.bin")
    convert([str(folder / "pytorch_model.v1.bin"), str(folder)])


def in_pieces(whole: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The decoder in a folder of its own; returned is the rest."""
    weights = load_file(whole / "model.safetensors")
    (folder / "llama").mkdir()
    decoder = {name.removeprefix(LANGUAGE): each for name, each in weights.items() if name.startswith(LANGUAGE)}
    save_file(decoder, folder / "llama" / "model.safetensors")
    return {name: each for name, each in weights.items() if not name.startswith(LANGUAGE)}


def q_former(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Queries, Q-Former and ln_vision under LAVIS's names, and something that MiniGPT-4 has no use for."""
    made = {"query_tokens": weights["query_tokens"], "t5_proj.weight": torch.zeros(3, 48)}
    for name, each in weights.items():
        if name.startswith("qformer."):
            name = name.replace("qformer.layernorm", "qformer.embeddings.LayerNorm").replace(
                "attention.attention.", "attention.self."
            )
            made[f"Qformer.bert.{name.removeprefix('qformer.')}"] = each
        elif "post_layernorm" in name:
            made[f"ln_vision.{name.rpartition('.')[2]}"] = each
    return made


def ours(folder: Path) -> torch.nn.Module:
    return load_model(open_checkpoint(folder), torch.float32)


def pixels(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(3))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.slow
@torch.no_grad()
def test_minigpt4_is_eva_blip2_and_one_linear(checkpoints, theirs):
    model, weights = ours(checkpoints("minigpt4")), published.eva_vit()
    reference = AutoModelForImageTextToText.from_pretrained(theirs / "blip-2", dtype=torch.float32).eval()
    norm = reference.vision_model.post_layernorm
    seen = torch.nn.functional.layer_norm(published.eva_features(weights, pixels()), (48,), norm.weight, norm.bias, 1e-5)
    queries = reference.query_tokens.expand(2, -1, -1)
    found = reference.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state
    close(parts_of(model)[0].module(pixels()), reference.language_projection(found))


@torch.no_grad()
def test_ziya_visual_is_instructblip(checkpoints, theirs):
    model = ours(checkpoints("ziya_visual"))
    reference = AutoModelForImageTextToText.from_pretrained(theirs / "instructblip", dtype=torch.float32).eval()
    asked, counts = torch.randint(3, 90, (2, 6)), torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    more = {"qformer_input_ids": asked, "qformer_attention_mask": counts}
    expected = reference.get_image_features(pixel_values=pixels(), return_dict=True, **more).pooler_output
    close(parts_of(model)[0].module(pixels(), asked, counts), expected)


@torch.no_grad()
def test_viscpm_is_beit3_and_its_queries(checkpoints):
    model = ours(checkpoints("viscpm"))
    vision = parts_of(model)[0]
    found = vision.module(pixels())
    assert found.shape[1:] == vision.outputs["image_features"].shape[1:] == (published.QUERIES, 64)
    close(found / 8, published.viscpm_features(published.viscpm(), pixels()))  # of what CPM-Bee divides by sqrt(64)


@torch.no_grad()
def test_the_decoder_reads_embeddings_as_it_reads_tokens(checkpoints):
    _, embed, decoder = parts_of(ours(checkpoints("viscpm")))
    ids, past = torch.tensor([[5, 6, 7, 8]]), [torch.zeros(1, 4, 0, 16) for _ in range(4)]
    layout = [torch.from_numpy(each) for each in made_up(LAYOUT, 1, 4).values()]
    given = (torch.arange(4)[None], torch.ones(1, 4, dtype=torch.int64), past, *layout)
    close(decoder.module(embed.module(ids), *given)[0], decoder.module(ids, *given)[0])


@pytest.mark.slow
def test_pieces_that_do_not_fit_together_are_refused(checkpoints, tmp_path):
    folder = tmp_path / "minigpt4"
    published.write_config("minigpt4", folder)
    with pytest.raises(UserError, match="has no safetensors files"):
        open_checkpoint(folder)
    for file in checkpoints("minigpt4").glob("*.safetensors"):
        shutil.copy(file, folder)
    with pytest.raises(UserError, match="llama"):
        open_checkpoint(folder)
    shutil.copytree(checkpoints("minigpt4") / "llama", folder / "llama")
    save_file({"llama_proj.weight": torch.zeros(2, 2)}, folder / "again.safetensors")
    with pytest.raises(UserError, match=r"has a tensor llama_proj\.weight, as has again"):
        open_checkpoint(folder)


@pytest.mark.exports
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in NAMES])
def test_every_part_through_levels_1_to_3(name, checkpoints, tmp_path):
    export(tmp_path, ExportOptions(checkpoint=checkpoints(name), dtype="float32"))
    check_levels(tmp_path, FUSED[name])

"""SDXL, Stable Diffusion 3 and FLUX: read in diffusers' layout, in parts whose numbers are diffusers' and transformers'."""

from pathlib import Path

import latent_models
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from families import counts
from transformers import CLIPTokenizer

from suture.core.network.graph_audit import audit_graph
from suture.core.signature import WANTS_FLOAT32
from suture.core.weights import load_graph
from suture.export.options import ExportOptions
from suture.export.stage import export
from suture.export.trace import trace_graph
from suture.models.architectures import architecture, load_model, open_checkpoint
from suture.models.named import preset_path, read_config
from suture.models.parts import GRAPH, Part, Port, parts_of
from suture.models.pictures import PictureModel, Wanted
from suture.surgery import __main__ as surgery
from suture.validate.pictures import in_pytorch

pytestmark = pytest.mark.usefixtures("one_thread")
CLIP_L, CLIP_L_PROJECTED, CLIP_G, T5_XXL = 123_060_480, 123_650_304, 694_659_840, 4_762_310_656
PUBLISHED = {  # parameters of each network
    "sdxl": {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "unet": 2_567_463_684, "vae": 83_653_863},
    "flux.1-dev": {"text_encoder": CLIP_L, "text_encoder_2": T5_XXL, "transformer": 11_901_408_320, "vae": 83_819_683},
    "sd3-medium": {
        "text_encoder": CLIP_L_PROJECTED, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL, "transformer": 2_028_328_000,
        "vae": 83_819_683,
    },
    "sd3.5-large": {
        "text_encoder": CLIP_L_PROJECTED, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL, "transformer": 8_056_627_520,
        "vae": 83_819_683,
    },
}  # fmt: skip


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_presets_networks_have_the_published_parameters(preset):
    model = architecture(read_config(preset_path(preset)), preset_path(preset))
    counted = {name: sum(each.numel() for each in network.parameters()) for name, network in model.named_children()}
    assert counted == PUBLISHED[preset]
    assert any(part.wants_float32 for part in parts_of(model)) == (preset == "sdxl")


@pytest.fixture(scope="module", params=latent_models.PIPELINES)
def family(request, tmp_path_factory) -> tuple[str, Path]:
    return request.param, latent_models.checkpoint(request.param, tmp_path_factory.mktemp(request.param))


def drawn(part: Part, **lengths: int) -> list[torch.Tensor]:
    """Inputs of a part, axes as long as `lengths` says and 2 in the batch."""
    torch.manual_seed(1)
    sizes = {"batch": 2, "height": 8, "width": 12, "2*height": 16, "2*width": 24, "patches": 6, "tokens": 5, **lengths}
    shapes = {name: [sizes.get(size, size) for size in port.shape] for name, port in part.inputs.items()}
    return [
        torch.randn(shapes[name]) if port.below is None else torch.randint(port.below, shapes[name])
        for name, port in part.inputs.items()
    ]


@torch.inference_mode()
def test_the_parts_numbers_are_diffusers(family):
    name, folder = family
    theirs = latent_models.networks(name)
    for part in parts_of(load_model(open_checkpoint(folder), torch.float32)):
        given = drawn(part)
        found = part.module(*given)
        found = [found] if isinstance(found, torch.Tensor) else found
        expected = reference(theirs, part.name, given, len(part.outputs))
        assert len(found) == len(part.outputs)
        for ours, own in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("negative", ["", "a blue square"])
def test_the_loop_of_sdxl_is_diffusers(negative, tmp_path):
    folder = latent_models.checkpoint("stable_diffusion_xl", tmp_path / "checkpoint")
    model = PictureModel(folder, in_pytorch(folder, onnx.TensorProto.FLOAT))
    wanted = [Wanted("a red circle", negative, seed=3), Wanted("a cross", negative, seed=4)]
    *_, last = model.denoise(wanted, 16, 24, 2, 4.0)
    pipeline = StableDiffusionXLPipeline(
        **latent_models.networks("stable_diffusion_xl"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        [each.prompt for each in wanted],
        negative_prompt=[negative] * 2 if negative else None,
        height=16,
        width=24,
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(each.seed) for each in wanted],
        output_type="latent",
    ).images
    np.testing.assert_allclose(last.latents, theirs.numpy(), rtol=1e-4, atol=1e-5)


def reference(theirs: dict, part: str, given: list[torch.Tensor], results: int) -> list[torch.Tensor]:
    """As diffusers' pipelines call their networks."""
    if part.startswith("text_encoder"):
        network = theirs[part]
        found = network(given[0], output_hidden_states=True)
        if type(network).__name__ == "T5EncoderModel":
            return [found[0]]
        if type(network).__name__ == "CLIPTextModelWithProjection":
            return [found.hidden_states[-2], found.text_embeds]
        return [found.pooler_output if "transformer" in theirs else found.hidden_states[-2]]
    if part == "vae_encoder":
        moments = theirs["vae"].encode(given[0]).latent_dist
        return [torch.cat([moments.mean, moments.parameters.chunk(2, 1)[1]], 1)]
    if part == "vae_decoder":
        return [theirs["vae"].decode(given[0]).sample]
    if part == "unet":
        sample, time, context, texts, sizes = given
        return [theirs["unet"](sample, time, context, added_cond_kwargs={"text_embeds": texts, "time_ids": sizes}).sample]
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids", "guidance")
    return [theirs["transformer"](**dict(zip(names, given))).sample]


class Joined(torch.nn.Module):
    def forward(self, halves: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """As SDXL joins the prompt with the sinusoids of a picture's sizes."""
        return torch.cat(
            [torch.concat([halves, numbers.float().sin()], -1), torch.concatenate([numbers.cos(), halves], -1)], -1
        )


def test_tensors_of_several_types_are_joined_as_torch_joins_them():
    ports = {"halves": Port(("batch", 3)), "numbers": Port(("batch", 3), below=9)}
    model = ir.to_proto(trace_graph(Part("joined", GRAPH, Joined(), ports, {"y": Port(("batch", 12))}), torch.float16))
    given = torch.randn(4, 3).half(), torch.randint(9, (4, 3))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: value.numpy() for name, value in zip(ports, given)})
    expected = Joined()(*given)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize(("upcast", "dtype", "said"), [(True, "float16", 1), (True, "float", 0), (False, "float16", 0)])
def test_an_autoencoder_that_overflows_is_said_at_build(upcast, dtype, said):
    """Of SDXL, whose pipeline heeds force_upcast; in the other families' configs it stands because diffusers writes it."""
    config = read_config(preset_path("sdxl"))
    config["networks"]["vae"]["force_upcast"] = upcast
    parts = parts_of(architecture(config, preset_path("sdxl")))
    assert [part.name for part in parts if part.wants_float32] == ["vae_decoder", "vae_encoder"] * upcast
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 18]> g ({dtype}[2] x) => ({dtype}[2] y) {{ y = Neg(x) }}'
    )
    onnx.helper.set_model_props(model, {WANTS_FLOAT32: "1"} if upcast else {})
    found = [each for each in audit_graph(model, Path()) if each.kind == "overflow"]
    assert len(found) == said
    assert all("float32 or bfloat16" in str(each) and each.severity == "warning" for each in found)


FUSED = {  # of the parts that only these families have; the rest has those of Stable Diffusion
    ("stable_diffusion_xl", "unet"): {"Attention": 16, "Swish": 20, "Gelu": 8, "LayerNormalization": 24 + 21},
    ("flux", "transformer"): {"Attention": 2, "RMSNormalization": 6, "LayerNormalization": 6, "RotaryEmbedding": 4, "Gelu": 3},
}
DECOMPOSED = ("Softmax", "ReduceMean", "Sigmoid", "Erf", "Tanh", "Neg", "Pow", "InstanceNormalization")


@pytest.mark.every
@pytest.mark.parametrize(("family", "part"), FUSED)
def test_a_part_is_fused_and_proven(family, part, tmp_path):
    """In float16, of which SDXL's tensors are joined with float32; surgery itself holds the graphs against each other."""
    folder = latent_models.checkpoint(family, tmp_path / "checkpoint")
    export(tmp_path, ExportOptions(checkpoint=folder, dtype="float16", part=part), pipeline=True)
    assert surgery.main([str(tmp_path / "export/model.onnx"), "--out", str(tmp_path / "surgery")]) == 0
    portable = load_graph(tmp_path / "surgery/model.onnx")
    assert counts(portable, tuple(FUSED[family, part])) == FUSED[family, part]
    assert counts(portable, DECOMPOSED) == {}

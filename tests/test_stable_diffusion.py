"""Stable Diffusion with a ControlNet: read in diffusers' layout and in the original one, in parts whose numbers are diffusers'."""

import json
import shutil
from pathlib import Path

import pictures
import pytest
import torch
from safetensors.torch import load_file, save_file

from suture.core.errors import UserError
from suture.models.architectures import architecture, load_model, meta_model, open_checkpoint
from suture.models.convert import main as convert
from suture.models.named import preset_path, read_config
from suture.models.parts import parts_of

PUBLISHED = {"unet": 859_520_964, "controlnet": 361_279_120, "text_encoder": 123_060_480, "vae": 83_653_863}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return pictures.checkpoint(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_the_presets_networks_have_the_published_parameters():
    """Those of diffusers' classes with the published config.json."""
    model = architecture(read_config(preset_path("sd15-controlnet")), preset_path("sd15-controlnet"))
    counted = {name: sum(each.numel() for each in network.parameters()) for name, network in model.named_children()}
    assert counted == PUBLISHED
    assert [part.name for part in parts_of(model)] == ["text_encoder", "controlnet", "unet", "vae_decoder", "vae_encoder"]
    unet = parts_of(model)[2]
    assert len(unet.reads) == 1 + 13  # the prompt, and a residual for each zero convolution
    assert unet.inputs["mid_block_res_sample"].shape == ("batch", 1280, "height/8", "width/8")
    assert parts_of(model)[1].inputs["controlnet_cond"].shape == ("batch", 3, "8*height", "8*width")


@torch.inference_mode()
def test_the_parts_numbers_are_diffusers(folder):
    found = {name: network.eval() for name, network in pictures.networks().items()}
    parts = {part.name: part for part in parts_of(load_model(open_checkpoint(folder), torch.float32))}
    ids, latents, hint = torch.arange(24)[None], torch.randn(1, 4, 8, 12), torch.rand(1, 3, 16, 24)
    time = torch.tensor([301])
    context = parts["text_encoder"].module(ids)
    torch.testing.assert_close(context, found["text_encoder"](ids).last_hidden_state)
    *down, middle = residuals = parts["controlnet"].module(latents, time, context, hint)
    expected = found["controlnet"](latents, time, context, hint, return_dict=False)
    torch.testing.assert_close((down, middle), tuple(expected))
    shapes = {name: tuple(value.shape) for name, value in zip(parts["controlnet"].outputs, residuals)}
    sizes = {"batch": 1, "height": 8, "width": 12, "height/2": 4, "width/2": 6}
    assert shapes == {
        name: tuple(sizes.get(s, s) for s in port.shape) for name, port in parts["unet"].inputs.items() if name in shapes
    }
    noise = parts["unet"].module(latents, time, context, *residuals)
    with_control = found["unet"](
        latents, time, context, down_block_additional_residuals=down, mid_block_additional_residual=middle
    )
    torch.testing.assert_close(noise, with_control.sample)
    assert not torch.allclose(noise, found["unet"](latents, time, context).sample)
    torch.testing.assert_close(parts["vae_decoder"].module(latents), found["vae"].decode(latents).sample)
    shown = 2 * torch.rand(1, 3, 16, 24) - 1
    mean, variance = parts["vae_encoder"].module(shown).chunk(2, 1)
    expected = found["vae"].encode(shown).latent_dist
    torch.testing.assert_close((mean, variance.exp()), (expected.mean, expected.var))


def test_without_a_controlnet_the_unet_takes_no_residuals(copy):
    shutil.rmtree(copy / "controlnet")
    parts = parts_of(meta_model(open_checkpoint(copy)))
    assert [part.name for part in parts] == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    assert list(parts[1].inputs) == ["sample", "timestep", "encoder_hidden_states"]


def test_published_names_of_old_are_read(copy):
    """stable-diffusion-v1-5's autoencoder and text encoder were saved under names that the classes have no more."""
    for file, renames in (
        ("vae/diffusion_pytorch_model", {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}),
        (
            "text_encoder/model",
            {"embeddings": "text_model.embeddings", "encoder": "text_model.encoder", "final": "text_model.final"},
        ),
    ):
        tensors = load_file(copy / f"{file}.safetensors")
        for new, old in renames.items():
            tensors = {
                name.replace(new, old) if new.startswith("to_") or name.startswith(new) else name: v
                for name, v in tensors.items()
            }
        save_file(tensors, copy / f"{file}.safetensors")
    meta_model(open_checkpoint(copy))


def test_the_single_files_become_the_same_folder(tmp_path):
    """A .ckpt of the original code's layout, and a ControlNet's .pth, by --like of a folder that has the dimensions alone."""
    hint = (4, 4, 8, 8)  # as many as all published ControlNets have
    found, folder = pictures.networks(hint), pictures.checkpoint(tmp_path / "folder", hint)
    torch.save({"state_dict": pictures.original(found), "global_step": 7}, tmp_path / "v1-5.ckpt")
    torch.save(pictures.original_control(found["controlnet"]), tmp_path / "control.pth")
    like = shutil.copytree(folder, tmp_path / "like", ignore=shutil.ignore_patterns("*.safetensors"))
    for file in ("v1-5.ckpt", "control.pth"):
        assert convert([str(tmp_path / file), str(tmp_path / "out"), "--like", str(like)]) == 0
    ours, theirs = open_checkpoint(tmp_path / "out"), open_checkpoint(folder)
    names = meta_model(theirs).state_dict()
    assert meta_model(ours).state_dict().keys() == names.keys()
    assert all(torch.equal(ours.load(name), theirs.load(name)) for name in names)
    with pytest.raises(UserError, match="text_encoder: exists"):
        convert([str(tmp_path / "v1-5.ckpt"), str(tmp_path / "out"), "--like", str(like)])


def test_a_file_of_another_layout_is_refused(folder, tmp_path):
    save_file({"model.layers.0.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="is not Stable Diffusion or a ControlNet in its first layout"):
        convert([str(tmp_path / "other.safetensors"), str(tmp_path / "out"), "--like", str(folder)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("model_index.json", {"_class_name": "KandinskyPipeline"}, "KandinskyPipeline"),
        ("model_index.json", {"_class_name": 7}, "_class_name"),
        ("unet/config.json", {"block_out_channels": [1 << 40, 32]}, "block_out_channels"),
        ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block"),
        ("unet/config.json", {"norm_num_groups": 7}, "unet is refused by diffusers"),
        ("vae/config.json", {"latent_channels": "four"}, "latent_channels"),
        ("unet/config.json", {"cross_attention_dim": 48}, "has shape"),
    ],
)
def test_what_cannot_be_read_is_one_line(copy, file, change, said):
    config = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=said) as error:
        meta_model(open_checkpoint(copy))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("network", ["unet", "vae", "text_encoder"])
def test_a_missing_network_is_named(copy, network):
    shutil.rmtree(copy / network)
    with pytest.raises(UserError, match=f"has no folder {network}"):
        open_checkpoint(copy)


def test_a_pickle_in_a_networks_place_is_not_read(copy):
    (copy / "unet/diffusion_pytorch_model.safetensors").rename(copy / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="is a pickle"):
        open_checkpoint(copy)

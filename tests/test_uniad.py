"""UniAD: its modules are what they are named after, its parts mean the same after each step, and a drive is the same in both."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from suture.core.driving import BACKBONE, PARTS, TRACK, DrivingConfig, read_driving
from suture.core.errors import UserError
from suture.models.architectures import architecture, load_model, open_checkpoint
from suture.models.drawn_road import DrawnRoad
from suture.models.named import checkpoint_folder, preset_path, read_config
from suture.models.uniad import backbone, bev_encoder, layers, map_head
from suture.runtime.cameras import projected, seen_by_cameras
from suture.runtime.driving import DrivingModel
from suture.runtime.tracks import Pose, Tracks, decode
from suture.validate.driving import compare_drives, frame_of

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = checkpoint_folder("tiny-uniad")


@pytest.fixture(scope="module")
def config() -> DrivingConfig:
    return read_driving(TINY)


@pytest.fixture(scope="module")
def model():
    return load_model(open_checkpoint(TINY), torch.float32)


def drawn(module: nn.Module, seed: int = 0, deviation: float = 0.3) -> nn.Module:
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=deviation)
    return module.eval().requires_grad_(False)


def test_deformable_attention_is_transformers():
    from transformers import DeformableDetrConfig
    from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrMultiscaleDeformableAttention

    sizes = [(4, 6), (2, 3)]
    theirs = drawn(
        DeformableDetrMultiscaleDeformableAttention(
            DeformableDetrConfig(d_model=16, encoder_attention_heads=4, num_feature_levels=2), num_heads=4, n_points=3
        )
    )
    ours = layers.Deformable(16, 4, 2, 3).eval()
    ours.load_state_dict(theirs.state_dict())
    query, value = torch.randn(2, 5, 16), torch.randn(2, 30, 16)
    for numbers in (2, 4):
        places = torch.rand(2, 5, numbers)
        expected, _ = theirs(
            hidden_states=query,
            encoder_hidden_states=value,
            reference_points=places[:, :, None].expand(-1, -1, 2, -1),
            spatial_shapes=torch.tensor(sizes),
            spatial_shapes_list=sizes,
            level_start_index=torch.tensor([0, 24]),
        )
        torch.testing.assert_close(ours(query, value, places, sizes), expected, atol=1e-5, rtol=1e-5)


def test_more_levels_than_there_are_are_read_as_the_kernel_does():
    """Number by number, as it counts them: what it takes for a query's head lies where `sampled` finds it."""
    heads, points, levels = 2, 3, 4
    x = torch.arange(5 * heads * levels * points * 2.0).reshape(1, 5, heads, levels, points, 2)
    found, flat = layers._as_the_kernel_reads(x, 1), x.flatten()
    for query in range(5):
        for head in range(heads):
            first = (query * heads + head) * points * 2  # one level's numbers a head
            assert found[0, query, head].flatten().tolist() == flat[first : first + points * 2].tolist()


def test_deformable_convolution_is_onnxs():
    ours = drawn(backbone.DeformableConvolution(2, 3))
    x = torch.randn(1, 2, 3, 4)
    found = ours.conv_offset(x).detach()
    ends = [("X", x), ("W", ours.weight), ("offset", found[:, :18]), ("B", torch.zeros(3)), ("mask", found[:, 18:].sigmoid())]
    node = helper.make_node("DeformConv", [name for name, _ in ends], ["Y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    infos = [helper.make_tensor_value_info(name, 1, list(value.shape)) for name, value in ends]
    graph = helper.make_graph([node], "g", infos, [helper.make_tensor_value_info("Y", 1, [1, 3, 3, 4])])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
    (expected,) = ReferenceEvaluator(proto).run(None, {name: value.detach().numpy() for name, value in ends})
    np.testing.assert_allclose(ours(x).numpy(), expected, atol=2e-5)


def test_layers_are_torchs_by_name_and_value():
    x, memory = torch.randn(3, 4, 16), torch.randn(1, 7, 16)
    seen = torch.tensor([True, False, True, True, False, True, True])
    encoder = drawn(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    ours = layers.TorchLayer(16, 2, 32, crossed=False).eval()
    ours.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(ours(x), encoder(x), atol=1e-5, rtol=1e-5)
    decoder = drawn(nn.TransformerDecoderLayer(16, 2, 32, batch_first=True))
    ours = layers.TorchLayer(16, 2, 32, crossed=True).eval()
    ours.load_state_dict(decoder.state_dict())
    expected = decoder(x, memory.expand(3, -1, -1), memory_key_padding_mask=~seen.expand(3, -1))
    torch.testing.assert_close(ours(x, memory, seen[None, None, None]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("module", [map_head.Attended, map_head.SelfAttention])
def test_attention_of_one_query_alone_is_written_apart(module):
    """Of the first of two queries the same: to what is attended to, or, of itself alone, in a sequence of one."""
    attention = drawn(module(16, 2))
    x, memory = torch.randn(1, 2, 16), torch.randn(1, 7, 16)
    if module is map_head.Attended:
        torch.testing.assert_close(attention(x[:, :1], memory, memory), attention(x, memory, memory)[:, :1])
    else:
        torch.testing.assert_close(attention(x[:, :1])[:, 0], attention(x[:, :1].expand(-1, 2, -1))[:, 0])


def test_the_pyramid_doubles_by_the_nearest():
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(backbone._doubled(x), nn.functional.interpolate(x, scale_factor=2, mode="nearest"))


def test_the_view_before_is_turned():
    view = torch.arange(16.0).reshape(1, 16, 1)
    assert torch.equal(bev_encoder.turned(view, torch.tensor(0.0), (4, 4)), view)
    quarter = bev_encoder.turned(view, torch.tensor(90.0), (4, 4)).reshape(4, 4)
    assert torch.equal(quarter, torch.rot90(view.reshape(4, 4)))
    eighth = bev_encoder.turned(view + 1, torch.tensor(45.0), (4, 4)).reshape(4, 4)
    assert eighth[0, 0] == 0  # a corner was beyond the edge


def test_sines_count_cells_as_mmdet_does():
    """A mask of zeros, summed along each side, with an offset of a half, by the last one."""
    found = map_head.sines(3, 5, 8).reshape(3, 5, 2, 2, 2)
    rows = (np.cumsum(np.ones(3)) - 0.5) / (2.5 + 1e-6 + 0.5) * 2 * np.pi
    np.testing.assert_allclose(found[:, 0, 0, 0, 0], np.sin(rows), atol=1e-6)
    np.testing.assert_allclose(found[0, :, 1, 1, 1], np.cos((np.arange(5) + 0.5) / 5 * 2 * np.pi / 100), atol=1e-5)


def published_cross_attention(module, query, features, places, seen, sizes):
    """Camera by camera, the cells that it sees and no others, as the published code gathers them."""
    slots, attention = torch.zeros_like(query), module.deformable_attention
    for camera in range(len(features)):
        own = seen[camera].nonzero()[:, 0]
        chosen = query[:, own]
        moved = attention.offsets(chosen) / layers.scales(sizes)
        where = moved.unflatten(-2, (-1, module.pillar)) + places[camera, own][None, :, None, None, None]
        slots[:, own] += attention.attend(chosen, features[camera][None], where.flatten(-3, -2), sizes)
    return query + module.output_proj(slots / seen.sum(0).clamp(min=1)[None, :, None])


def overlapping(config: DrivingConfig) -> np.ndarray:
    """The second camera turned, so that some cells are seen by both."""
    matrices = DrawnRoad(8, config.height, config.width).lidar2img()
    return matrices[:2]


def test_room_for_each_cameras_cells_is_the_published_gathering(config):
    """And so is room for all cells, the dense form."""
    module = drawn(bev_encoder.SpatialAttention(config), deviation=0.2)
    sizes, lidar2img = config.level_sizes, overlapping(config)
    query = torch.randn(1, config.cells, config.embed_dims)
    features = torch.randn(2, sum(height * width for height, width in sizes), config.embed_dims)
    places, seen = projected(lidar2img, config)
    assert seen.all(0).any()  # by both
    assert not seen.any(0).all()  # by none
    expected = published_cross_attention(module, query, features, *map(torch.from_numpy, (places, seen)), sizes)
    for room in (config.camera_queries, config.cells):
        given = seen_by_cameras(lidar2img, config.model_copy(update={"camera_queries": room}))
        found = module(query, features, tuple(torch.from_numpy(each) for each in given.values()), sizes)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_calibration_that_needs_more_room_is_refused(config):
    lidar2img = overlapping(config)
    most = int(projected(lidar2img, config)[1].sum(1).max())
    seen_by_cameras(lidar2img, config.model_copy(update={"camera_queries": most}))
    with pytest.raises(UserError, match=rf"has room for {most - 1}.*camera_queries"):
        seen_by_cameras(lidar2img, config.model_copy(update={"camera_queries": most - 1}))
    with pytest.raises(UserError, match=r"more than 1 cameras see one cell.*camera_overlap"):
        seen_by_cameras(lidar2img, config.model_copy(update={"camera_overlap": 1}))


def test_cameras_see_what_is_drawn_where_it_is(config):
    """A car ahead lies where the projection says: its paint is there."""
    road = DrawnRoad(2, 64, 128, seed=1)
    x, y, z, *_ = road.boxes(0)[np.argmax(road.boxes(0)[:, 1] * (abs(road.boxes(0)[:, 0]) < 1.9))]
    shown = road.lidar2img()[0] @ np.array([x, y, z, 1])
    column, row = (shown[:2] / shown[2]).astype(int)
    red, green, blue = road.pictures(0)[0, row, column].astype(int)
    assert max(red, green, blue) - min(red, green, blue) > 40 or min(red, green, blue) > 100


def test_tracks_are_kept_known_and_forgotten(config):
    config = config.model_copy(update={"tracks": 3, "num_query": 4, "miss_tolerance": 2, "score_thresh": 0.4})
    tracks, width = Tracks(config), config.embed_dims
    learned = config.num_query + 1

    def made(scores: list[float]) -> dict[str, np.ndarray]:
        count = learned + config.tracks
        logits = np.full([1, count, config.num_classes], -9.0, np.float32)
        logits[0, : len(scores), 1] = np.log(np.array(scores) / (1 - np.array(scores)))
        numbers = np.arange(count, dtype=np.float32)[None, :, None]
        boxes = np.zeros([1, count, 10], np.float32)
        boxes[0, :, 8] = 10  # metres a second
        return {
            "logits": logits, "boxes": boxes, "points": np.zeros([1, count, 3], np.float32),
            "queries": numbers.repeat(2 * width, 2), "embeddings": numbers.repeat(width, 2),
        }  # fmt: skip

    pose = Pose(np.eye(3), np.zeros(3), 0.0)
    assert tracks.given(pose)["track_active"].tolist() == [[0, 0, 0]]
    objects, taken = tracks.found(made([0.9, 0.1, 0.8, 0.2, 0.99]))  # the last is the vehicle's own
    assert objects.ids == [0, 1]
    assert objects.labels.tolist() == [1, 1, 1]
    assert objects.embeddings[:, 0].tolist() == [0, 2, 4]
    assert taken["active"].tolist() == taken["saves"].tolist() == [[1, 1, 0]]
    after = {"next_queries": taken["queries"] + 100, "next_memory": taken["memory"] + 7}
    tracks.keep(taken, after)
    assert tracks.state["remembered"].tolist() == [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    given = tracks.given(Pose(np.eye(3), np.array([2.0, 0, 0]), 0.5))
    assert given["track_queries"][0, :2, 0].tolist() == [100, 102]
    share = (3.0 + 51.2) / 102.4  # of the view: 5 metres by its own speed, 2 less by the vehicle's
    np.testing.assert_allclose(given["track_points"][0, 0, 0], np.log(share / (1 - share)), rtol=1e-5)
    objects, taken = tracks.found(made([0.7, 0.6, 0.1, 0.1, 0.5, 0.5, 0.1, 0.1]))  # three places, and four would be there
    assert objects.ids == [2, 3, 0]
    assert tracks.ids.tolist() == [2, 3, 0]
    tracks.keep(taken, after)
    assert tracks.state["remembered"].sum(1).tolist() == [1, 1, 1]  # number 0 waits
    for expected in ([2, 3, 0], [-1, -1, -1]):
        _, taken = tracks.found(made([0.1] * 8))
        assert tracks.ids.tolist() == expected
        tracks.keep(taken, after)


def test_a_box_is_decoded():
    box = np.array([[1, 2, np.log(1.9), np.log(4.5), 3, np.log(1.7), 1, 0, 5, 6]], np.float32)
    np.testing.assert_allclose(decode(box), [[1, 2, 3, 1.9, 4.5, 1.7, np.pi / 2, 5, 6]], rtol=1e-6)


def called(part):
    def run(inputs):
        with torch.inference_mode():
            found = part.module(*(torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in part.inputs))
        found = [found] if isinstance(found, torch.Tensor) else found
        return {name: value.numpy() for name, value in zip(part.outputs, found)}

    return run


def test_a_drive_carries_view_and_tracks_along(config, model):
    runs = {part.name: called(part) for part in model.parts()}
    road, driving = DrawnRoad(config.cameras, config.height, config.width), DrivingModel(runs, config)
    seen = [driving.step(frame_of(road, number)) for number in range(3)]
    assert set(seen[2].objects.ids) & set(seen[1].objects.ids)  # the same objects again
    assert seen[2].occupied.shape == (config.occ_n_future + 1, config.bev_h, config.bev_w)
    assert seen[2].plan.shape == (config.planning_steps, 2)
    alone = DrivingModel(runs, config).step(frame_of(road, 2))
    assert abs(alone.plan - seen[2].plan).max() > 1e-3  # what was before counts
    damaged = dict(runs)
    damaged[TRACK] = lambda inputs: runs[TRACK](inputs | {"track_queries": inputs["track_queries"] * 0})
    found = compare_drives(DrivingModel(runs, config), DrivingModel(damaged, config), config, 0.5, 0.97, 0)
    assert not found.passed
    assert json.loads(json.dumps(asdict(found)))["frames"] == found.frames
    assert compare_drives(DrivingModel(runs, config), DrivingModel(runs, config), config, 1e-6, 1.0, 0).passed


def test_the_preset_has_the_published_layers():
    """base_e2e.py's: of each kind as many, and as wide."""
    model = architecture(read_config(preset_path("uniad")), Path("config.json"))
    stages = [getattr(model.img_backbone, f"layer{stage}") for stage in (1, 2, 3, 4)]
    assert [len(stage) for stage in stages] == [3, 4, 23, 3]
    deformable = [sum(isinstance(block.conv2, backbone.DeformableConvolution) for block in stage) for stage in stages]
    assert deformable == [0, 0, 23, 3]
    head, seg, motion, occ = model.pts_bbox_head, model.seg_head, model.motion_head, model.occ_head
    assert len(head.transformer.encoder.layers) == len(head.transformer.decoder.layers) == 6
    assert len(seg.transformer.encoder.layers) == len(seg.transformer.decoder.layers) == 6
    assert len(seg.things_mask_head.blocks) == 4
    assert len(seg.stuff_mask_head.blocks) == 6
    assert len(motion.motionformer.bev_interaction_layers) == 3
    assert len(occ.transformer_decoder.layers) == len(occ.temporal_mlps) == 5
    assert len(model.planning_head.attn_module.layers) == 3
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["query_embedding.weight"] == (901, 512)
    assert shapes["pts_bbox_head.bev_embedding.weight"] == (40000, 256)
    attention = "pts_bbox_head.transformer.encoder.layers.5.attentions"
    assert shapes[f"{attention}.0.sampling_offsets.weight"] == (2 * 8 * 4 * 2, 512)
    assert shapes[f"{attention}.1.deformable_attention.sampling_offsets.weight"] == (8 * 4 * 8 * 2, 256)
    assert shapes["motion_head.kmeans_anchors"] == (4, 6, 12, 2)
    assert shapes["img_backbone.layer3.22.conv2.conv_offset.weight"] == (27, 256, 3, 3)
    assert shapes["occ_head.transformer_decoder.layers.4.ffns.0.layers.0.0.weight"] == (2048, 256)
    heads = Counter()
    for name, shape in shapes.items():
        heads[name.partition(".")[0]] += int(np.prod(shape))
    assert sum(heads.values()) == 131_931_318
    sizes = {part.name: part for part in model.parts()}
    assert sizes[BACKBONE].outputs["level0"].shape == (1, 6, 256, 116, 200)
    assert [part.name for part in model.parts()] == list(PARTS)


def test_a_config_that_is_none_is_refused():
    tiny = json.loads((TINY / "config.json").read_text())
    for wrong, named in (
        ({"height": 33}, "height"),
        ({"map_levels": 2}, "map_levels"),
        ({"bev_h": 20}, "bev_h"),
        ({"occ_layers": 3}, "occ_layers"),
        ({"spatial_points": 6}, "spatial_points"),
        ({"camera_queries": 300}, "camera_queries"),
        ({"num_heads": 3}, "embed_dims"),
    ):
        with pytest.raises(UserError, match=named):
            architecture(tiny | wrong, Path("config.json"))

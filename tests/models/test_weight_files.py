"""Weight files as other programs write them: wrapped, nested, and named in their own ways."""

import re

import pytest
import torch

from fastuda.errors import UserError
from fastuda.models import ModelConfig, build_model
from fastuda.models.backbones import BACKBONES
from fastuda.models.normalization import IMAGENET
from fastuda.models.weight_keys import remap
from fastuda.models.weights import read_state


def fresh(name):
    torch.manual_seed(5)
    return {key: torch.randn_like(v) if v.is_floating_point() else v
            for key, v in BACKBONES[name](False).state_dict().items()}  # fmt: skip


def loaded(path, backbone, **settings):
    return build_model(ModelConfig(backbone=backbone, weights=str(path), **settings), 4)


def holds(model, state):
    own = model.backbone.state_dict()
    return all(torch.equal(own[key], value) for key, value in state.items())


def test_an_empty_file_is_said_to_be_empty(tmp_path):
    for name in ("empty.pth", "empty.safetensors"):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=f"{name} cannot be read as weights: it is empty"):
            read_state(tmp_path / name)


@pytest.mark.parametrize(
    "prefix",
    ["model.", "net.", "encoder.", "_orig_mod.", "module.", "module._orig_mod.", "model.backbone.",
     "network.encoder."],
)  # fmt: skip
def test_names_in_front_of_every_key_are_dropped(prefix, tmp_path):
    state = fresh("resnet18")
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "w.pth")
    assert holds(loaded(tmp_path / "w.pth", "resnet18"), state)


def test_our_own_network_compiled_or_wrapped(tmp_path):
    model = build_model(ModelConfig(backbone="small"), 4)
    torch.save({f"_orig_mod.{k}": v for k, v in model.state_dict().items()}, tmp_path / "w.pth")
    found = loaded(tmp_path / "w.pth", "small")
    assert all(torch.equal(found.state_dict()[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("path", ["teacher", "state_dict_ema", "state_dict", "anything", "state_dict.model"])
def test_a_state_one_level_down(path, tmp_path):
    state = fresh("resnet18")
    inner = state
    for key in reversed(path.split(".")):
        inner = {key: inner, "epoch": 3}
    torch.save(inner, tmp_path / "w.pth")
    assert holds(loaded(tmp_path / "w.pth", "resnet18"), state)


def test_several_networks_in_one_file_are_named(tmp_path):
    torch.save({"G": fresh("small"), "D": {"w": torch.zeros(1)}}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth contains several networks \(G, D\): save the state of one"):
        read_state(tmp_path / "w.pth")


def test_a_checkpoint_of_fada_gives_backbone_and_head(tmp_path):
    source = build_model(ModelConfig(backbone="resnet18", aspp_bias=True), 4)
    backbone = {f"module.backbone.{k}": v for k, v in source.backbone.state_dict().items()}
    head = {f"module.{k.replace('convs', 'conv2d_list')}": v for k, v in source.head.state_dict().items()}
    torch.save({"iteration": 1, "feature_extractor": backbone, "classifier": head}, tmp_path / "w.pth")
    model = loaded(tmp_path / "w.pth", "resnet18", aspp_bias=True)
    assert model.input == IMAGENET
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_keys_that_fit_nothing_are_shown_beside_the_networks(tmp_path):
    state = {f"encoder_q.{key}": value for key, value in fresh("resnet18").items()}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError) as refusal:
        loaded(tmp_path / "w.pth", "resnet18")
    said = str(refusal.value)
    assert "backbone.conv1.weight" in said and "the file has encoder_q.conv1.weight, encoder_q.bn1" in said


def as_nvlabs(state):
    """MiT's state under the names of NVlabs' files."""
    out, parts = {}, {"layernorm_before": "norm1", "layernorm_after": "norm2",
                      "attention.q_proj": "attn.q", "attention.o_proj": "attn.proj",
                      "attention.sequence_reduction.sequence_reduction": "attn.sr",
                      "attention.sequence_reduction.layer_norm": "attn.norm"}  # fmt: skip
    for key, value in state.items():
        stage, rest = re.fullmatch(r"encoder\.stages\.(\d)\.(.+)", key).groups()
        number = int(stage) + 1
        if block := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(\w+)", rest):
            index, part, leaf = block.groups()
            name = f"block{number}.{index}."
            if part == "attention.v_proj":
                continue
            if part == "attention.k_proj":
                other = state[key.replace("k_proj", "v_proj")]
                out[f"{name}attn.kv.{leaf}"] = torch.cat([value, other])
            else:
                out[f"{name}{parts.get(part, part)}.{leaf}"] = value
        elif rest.startswith("patch_embeddings."):
            rest = rest.replace("patch_embeddings.", "").replace("layer_norm", "norm")
            out[f"patch_embed{number}.{rest}"] = value
        else:
            out[f"norm{number}.{rest.removeprefix('layer_norm.')}"] = value
    return out


def as_mmsegmentation(state):
    """NVlabs' names as mmsegmentation's mit2mmseg.py turns them into its own."""
    out = {}
    for key, value in as_nvlabs(state).items():
        kind, number, rest = re.fullmatch(r"([a-z_]+)(\d)\.(.+)", key).groups()
        stage = f"layers.{int(number) - 1}"
        if kind == "patch_embed":
            out[f"{stage}.0.{rest.replace('proj.', 'projection.')}"] = value
        elif kind == "norm":
            out[f"{stage}.2.{rest}"] = value
        elif ".attn.q." in rest:
            both = torch.cat([value, as_nvlabs(state)[key.replace(".q.", ".kv.")]])
            out[f"{stage}.1.{rest.replace('.q.', '.attn.in_proj_')}"] = both
        elif ".attn.kv." not in rest:
            if re.search(r"fc[12]\.weight", rest):
                value = value[..., None, None]
            for old, new in (("attn.proj", "attn.attn.out_proj"), ("mlp.fc1", "ffn.layers.0"),
                             ("mlp.dwconv.dwconv", "ffn.layers.1"), ("mlp.fc2", "ffn.layers.4")):  # fmt: skip
                rest = rest.replace(old, new)
            out[f"{stage}.1.{rest}"] = value
    return out


WRITERS = {
    "nvlabs": as_nvlabs,
    "mmsegmentation": lambda state: {f"backbone.{k}": v for k, v in as_mmsegmentation(state).items()},
    "transformers 5": lambda state: {k.replace("encoder", "segformer", 1): v for k, v in state.items()},
    "transformers 5, the encoder": lambda state: {k.removeprefix("encoder."): v for k, v in state.items()},
}


@pytest.mark.parametrize("writer", WRITERS)
def test_segformer_files(writer, tmp_path):
    pytest.importorskip("transformers")
    state = fresh("mit_b0")
    written = WRITERS[writer](state)
    torch.save({"state_dict": {**written, "decode_head.x": torch.zeros(1)}}, tmp_path / "w.pth")
    model = loaded(tmp_path / "w.pth", "mit_b0")
    assert holds(model, state) and not set(state) & set(written)


def as_dinov2(state):
    """DINOv2's state of transformers under the names of the hub's files."""
    whole = {"embeddings.position_embeddings": "pos_embed", "layernorm": "norm",
             "embeddings.patch_embeddings.projection": "patch_embed.proj", "embeddings.": "",
             "encoder.layer": "blocks",
             "attention.o_proj": "attn.proj", "layer_scale1.lambda1": "ls1.gamma",
             "layer_scale2.lambda1": "ls2.gamma"}  # fmt: skip
    out = {}
    for key, value in state.items():
        if re.search(r"\.[kv]_proj\.", key):
            continue
        name = key
        for ours, hub in whole.items():
            name = name.replace(ours, hub)
        if ".q_proj." in key:
            value = torch.cat([state[key.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
            name = name.replace("attention.q_proj", "attn.qkv")
        out[name] = value
    return out


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_of_the_hub_in_the_names_of_transformers(registers, tmp_path):
    transformers = pytest.importorskip("transformers")
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    more = {"num_register_tokens": registers} if registers else {}
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, **more
    )
    torch.manual_seed(0)
    state = getattr(transformers, f"{kind}Backbone")(config).state_dict()
    state = {key: torch.randn_like(value) for key, value in state.items()}
    hub = as_dinov2(state)
    assert {"cls_token", "mask_token", "pos_embed", "blocks.1.attn.qkv.bias", "blocks.0.ls1.gamma",
            "norm.bias", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"} <= hub.keys()  # fmt: skip
    assert ("register_tokens" in hub) == bool(registers)
    found, layout = remap(hub)
    assert layout == "dinov2" and found.keys() == {f"backbone.network.{key}" for key in state}
    assert all(torch.equal(found[f"backbone.network.{key}"], value) for key, value in state.items())
    config.save_pretrained(tmp_path)
    torch.save(hub, tmp_path / "hub.pth")
    model = loaded(tmp_path / "hub.pth", f"hf:{tmp_path}")
    assert holds(model, {f"network.{key}": value for key, value in state.items()})

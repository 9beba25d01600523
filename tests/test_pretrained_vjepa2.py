"""Weights of V-JEPA 2, 2-AC and their probes: equal outputs with random weights, strict reading."""

import warnings

import pytest
import torch
from einops import rearrange
from safetensors.torch import save_file

from jepa_world.encoders.pretrained import (
    fold_pixel_statistics,
    load_attentive_probe,
    load_vjepa2,
    load_vjepa2_ac,
)
from jepa_world.encoders.vit import ViTEncoder
from jepa_world.nn import AttentiveProbe, take_tokens
from jepa_world.predictors.block_causal import BlockCausalPredictor
from jepa_world.predictors.masked import MaskedTransformer

SHAPES = {
    "square": dict(
        crop_size=32, patch_size=8, frames_per_clip=4, hidden_size=48, num_attention_heads=2
    ),
    "one-step": dict(
        crop_size=28, patch_size=14, frames_per_clip=2, hidden_size=64, num_attention_heads=1
    ),
    "giant's-ratio": dict(
        crop_size=24,
        patch_size=8,
        frames_per_clip=3,
        tubelet_size=1,
        hidden_size=66,
        num_attention_heads=3,
        mlp_ratio=48 / 11,
        pred_num_mask_tokens=1,
    ),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def theirs(shape, name="VJEPA2Model", **changes):
    """Return a transformers model with random weights."""
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 2, "pred_hidden_size": 36, "pred_num_attention_heads": 2}
    sizes |= {"pred_num_hidden_layers": 2, "pred_num_mask_tokens": 3, "pred_mlp_ratio": 2.0}
    config = transformers.VJEPA2Config(**sizes | shape | changes)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, name)(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def save(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def facts(shape):
    """Return the arguments that tell what no weight tells."""
    side = (shape["crop_size"], shape["crop_size"])
    known = {"frames": shape["frames_per_clip"], "image_size": side, "predictor_heads": 2}
    return known | {"heads": shape["num_attention_heads"]}


def clip(shape, batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, shape["frames_per_clip"], 3, shape["crop_size"], shape["crop_size"])


def near(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@every_shape
def test_encoder_and_predictor_compute_what_transformers_does(shape):
    model, video = theirs(shape), clip(shape)
    encoder, predictor = load_vjepa2(model.state_dict(), source="transformers", **facts(shape))
    expected, z = model(video), rearrange(encoder(video), "b t n d -> b (t n) d")
    near(z, expected.last_hidden_state)
    every = torch.arange(z.shape[1]).expand(2, -1)
    chosen = 1 % model.config.pred_num_mask_tokens
    found = predictor(z, every, every, mask_token=chosen)
    near(found, expected.predictor_output.last_hidden_state)


@torch.no_grad()
@every_shape
def test_under_masks_too(shape):
    model, video = theirs(shape), clip(shape)
    encoder, predictor = load_vjepa2(model.state_dict(), source="transformers", **facts(shape))
    z = rearrange(encoder(video), "b t n d -> b (t n) d")
    order = torch.rand(z.shape[:2]).argsort(1)
    context, target = order[:, : z.shape[1] // 2], order[:, z.shape[1] // 2 : -1]
    expected = model(video, context_mask=[context], target_mask=[target])
    near(take_tokens(z, context), expected.masked_hidden_state)
    chosen = 1 % model.config.pred_num_mask_tokens
    found = predictor(take_tokens(z, context), context, target, mask_token=chosen)
    near(found, expected.predictor_output.last_hidden_state)


@torch.no_grad()
@every_shape
def test_kept_tokens_are_those_of_an_encoder_that_is_given_no_others(shape):
    model, video = theirs(shape), clip(shape)
    encoder, _ = load_vjepa2(model.state_dict(), source="transformers", **facts(shape))
    patches = model.encoder.embeddings(video)
    keep = torch.rand(patches.shape[:2]).argsort(1)[:, : patches.shape[1] // 2]
    x = take_tokens(patches, keep)
    for layer in model.encoder.layer:
        x = layer(x, keep)[0]
    near(encoder(video, keep=keep), model.encoder.layernorm(x))


@torch.no_grad()
@every_shape
def test_a_folder_of_transformers_tells_everything_itself(shape, tmp_path):
    model, video = theirs(shape, layer_norm_eps=1e-3), clip(shape)
    encoder, predictor = load_vjepa2(save(model, tmp_path), source="transformers")
    expected, z = model(video), encoder(video)
    near(z.flatten(1, 2), expected.last_hidden_state)
    every = torch.arange(z.shape[1] * z.shape[2]).expand(2, -1)
    chosen = 1 % model.config.pred_num_mask_tokens
    found = predictor(z.flatten(1, 2), every, every, mask_token=chosen)
    near(found, expected.predictor_output.last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("layers", [0, 2])
def test_a_classifier_of_transformers_is_backbone_and_attentive_probe(layers, tmp_path):
    shape = SHAPES["square"]
    changes = {"num_pooler_layers": layers, "num_labels": 5}
    model, video = theirs(shape, "VJEPA2ForVideoClassification", **changes), clip(shape)
    save(model, tmp_path)
    encoder, _ = load_vjepa2(tmp_path, source="transformers")
    probe = load_attentive_probe(tmp_path, source="transformers")
    near(probe(encoder(video).flatten(1, 2)), model(video).logits)
    again = load_attentive_probe(model.state_dict(), source="transformers", heads=2)
    near(again(encoder(video).flatten(1, 2)), model(video).logits)


def metas(module, prefix, **outer):
    """Return a module's weights as Meta's files name them, `outer` the first words of a name."""
    inner = {".attention.": ".attn.", ".attn.out.": ".attn.proj."}
    inner |= {".mlp.0.": ".mlp.fc1.", ".mlp.3.": ".mlp.fc2."}
    weights = {}
    for name, value in module.state_dict().items():
        for ours, other in inner.items():
            name = name.replace(ours, other)
        first = next((ours for ours in outer if name.startswith(f"{ours}.")), "")
        weights[prefix + outer.get(first, "") + name.removeprefix(first)] = value.clone()
    return weights


def encoder_of_meta(encoder, prefix="module.backbone."):
    weights = metas(encoder, prefix, embed="patch_embed.proj")
    kernel = weights[prefix + "patch_embed.proj.weight"]
    sides = {"p": encoder.tubelet, "q": encoder.patch, "r": encoder.patch}
    kernel = rearrange(kernel, "d (p q r c) -> d c p q r", **sides)
    return weights | {prefix + "patch_embed.proj.weight": kernel}


PREDICTOR = {name: f"predictor_{name}" for name in ("embed", "blocks", "norm")}
PREDICTOR |= {"out": "predictor_proj"}


def predictor_of_meta(predictor, prefix="module.backbone."):
    weights = metas(predictor, prefix, **PREDICTOR)
    for number, token in enumerate(weights.pop(prefix + "mask_token")):
        weights[f"{prefix}mask_tokens.{number}"] = token[None, None]
    return weights


def make(seed=0):
    """Return an encoder and a masked predictor of ours."""
    torch.manual_seed(seed)
    encoder = ViTEncoder(
        (4, 3, 16, 24), patch=8, tubelet=2, dim=48, depth=2, heads=2, positions="rotary"
    )
    options = {"width": 24, "depth": 1, "heads": 2, "positions": "rotary", "mask_tokens": 4}
    predictor = MaskedTransformer(48, encoder.grid, **options)
    for parameter in (*encoder.parameters(), *predictor.parameters()):
        torch.nn.init.normal_(parameter, std=0.2)
    return encoder.eval(), predictor.eval()


GIVEN = {"frames": 4, "image_size": (16, 24), "heads": 2, "predictor_heads": 2}


def content_of_meta():
    (student, _), (teacher, predictor) = make(1), make(0)
    pos_embed = {"module.backbone.pos_embed": torch.zeros(1, 12, 48)}
    predictor_pos_embed = {"module.backbone.predictor_pos_embed": torch.zeros(1, 12, 24)}
    return {
        "encoder": encoder_of_meta(student) | pos_embed,
        "target_encoder": encoder_of_meta(teacher) | pos_embed,
        "predictor": predictor_of_meta(predictor) | predictor_pos_embed,
        "opt": {},
        "epoch": 90,
    }


@torch.no_grad()
def test_a_file_of_metas_gives_the_teacher_and_the_predictor(tmp_path):
    torch.save(content_of_meta(), tmp_path / "vitl.pt")
    (tmp_path / "config.json").write_text('{"model_type": "of another file"}')
    encoder, predictor = load_vjepa2(tmp_path / "vitl.pt", **GIVEN)
    (teacher, asking), video = make(0), torch.randn(2, 4, 3, 16, 24)
    near(encoder(video), teacher(video))
    given = torch.randn(2, 2, 48), torch.tensor([[0, 3], [5, 1]]), torch.tensor([[2], [11]])
    for token in range(4):
        near(predictor(*given, mask_token=token), asking(*given, mask_token=token))
    assert encoder.state_dict().keys() == teacher.state_dict().keys()


@torch.no_grad()
def test_what_metas_file_holds_equals_the_same_weights_in_transformers():
    shape = SHAPES["square"]
    encoder, predictor = load_vjepa2(
        theirs(shape).state_dict(), source="transformers", **facts(shape)
    )
    content = {"encoder": encoder_of_meta(encoder), "predictor": predictor_of_meta(predictor)}
    again = load_vjepa2(content, **facts(shape))
    for ours, read in zip((encoder, predictor), again, strict=True):
        torch.testing.assert_close(read.state_dict(), ours.state_dict(), atol=0, rtol=0)


def changed(part, change):
    def apply(content):
        change(content[part])

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("predictor"), "holds no 'predictor', but "),
        (changed("target_encoder", lambda w: w.update(head=torch.zeros(1))), "unknown 'head'"),
        (
            changed("target_encoder", lambda w: w.pop("module.backbone.norm.bias")),
            r"lack 'norm\.bias'",
        ),
        (
            changed("predictor", lambda w: w.update({"module.x": torch.zeros(1)})),
            "hold unknown 'x'",
        ),
        (
            changed("predictor", lambda w: w.pop("module.backbone.mask_tokens.1")),
            r"lack 'mask_tokens\.1'",
        ),
        (
            changed(
                "target_encoder",
                lambda w: w.update({"module.backbone.blocks.1.attn.qkv.weight": torch.zeros(3, 3)}),
            ),
            r"'blocks\.1\.attention\.qkv\.weight' of shape \(3, 3\), expected \(144, 48\)",
        ),
        (
            changed(
                "target_encoder",
                lambda w: w.update({"module.backbone.patch_embed.proj.weight": torch.zeros(3, 3)}),
            ),
            r"'embed\.weight' of shape \(3, 3\), expected 5 axes",
        ),
        (changed("target_encoder", lambda w: w.update(epoch=3)), "'epoch' is a int, not a weight"),
    ],
)
def test_content_that_does_not_fit_is_refused(change, message):
    content = content_of_meta()
    change(content)
    with pytest.raises(ValueError, match=message):
        load_vjepa2(content, **GIVEN)


@pytest.mark.parametrize("fact", sorted(GIVEN))
def test_facts_that_no_weight_tells_are_asked_for(fact):
    given = {name: value for name, value in GIVEN.items() if name != fact}
    with pytest.raises(ValueError, match=f"no weight tells {fact}, .* the published .* {fact}="):
        load_vjepa2(content_of_meta(), **given)


def broken(tmp_path, kind):
    """Write a file or a folder that cannot be read, and return it."""
    if kind == "missing":
        return tmp_path / "missing.pt"
    if kind == "text":
        (tmp_path / "a.pt").write_text("<html>404</html>")
    if kind == "object":
        torch.save({"encoder": object()}, tmp_path / "a.pt")
    if kind == "list":
        torch.save([torch.zeros(1)], tmp_path / "a.pt")
    if kind in ("truncated", "empty"):
        torch.save(content_of_meta(), tmp_path / "a.pt")
        whole = (tmp_path / "a.pt").read_bytes()
        (tmp_path / "a.pt").write_bytes(whole[: len(whole) // 2] if kind == "truncated" else b"")
    return tmp_path / "a.pt"


@pytest.mark.parametrize("load", [load_vjepa2, load_vjepa2_ac, load_attentive_probe])
@pytest.mark.parametrize("kind", ["missing", "text", "object", "list", "truncated", "empty"])
def test_a_file_that_is_damaged_or_of_another_kind_is_refused_in_one_line(kind, load, tmp_path):
    file = broken(tmp_path, kind)
    with pytest.raises(ValueError, match=f"'{file}' (cannot be read as weights|holds a list)") as e:
        load(file)
    assert "\n" not in str(e.value)


def test_a_folder_of_transformers_that_does_not_fit_is_refused(tmp_path):
    folder = save(theirs(SHAPES["square"]), tmp_path)
    file, described = folder / "model.safetensors", folder / "config.json"
    whole, told = file.read_bytes(), described.read_text()
    described.write_text(told.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(ValueError, match=r"hold 2 blocks where config\.json says 3"):
        load_vjepa2(folder, source="transformers")
    described.write_text(told.replace("crop_size", "side"))
    with pytest.raises(ValueError, match=r"config\.json lacks 'crop_size'"):
        load_vjepa2(folder, source="transformers")
    described.write_text(told.replace('"gelu"', '"silu"'))
    with pytest.raises(ValueError, match="says hidden_act 'silu', expected 'gelu'"):
        load_vjepa2(folder, source="transformers")
    described.write_text(told)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read as weights alone"):
        load_vjepa2(folder, source="transformers")
    save_file({"other.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"hold unknown 'other\.weight'"):
        load_vjepa2(folder, source="transformers")


def probe_of_meta(depth=2):
    torch.manual_seed(0)
    probe = AttentiveProbe(48, 5, heads=16, depth=depth).eval()
    for parameter in probe.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for part in probe.modules():
        if isinstance(part, torch.nn.LayerNorm):
            part.eps = 1e-5
    pool = {name: f"pooler.cross_attention_block.{name}" for name in ("norm1", "norm2")}
    pool |= {"attention": "pooler.cross_attention_block.xattn", "out": "linear"}
    pool |= {"mlp.0": "pooler.cross_attention_block.mlp.fc1"}
    pool |= {"mlp.3": "pooler.cross_attention_block.mlp.fc2", "blocks": "pooler.blocks"}
    weights = metas(probe, "module.", **pool)
    weights["module.pooler.query_tokens"] = weights.pop("module.query")[None, None]
    return probe, weights


@torch.no_grad()
@pytest.mark.parametrize("depth", [0, 2])
def test_probes_of_metas_files_are_read(depth, tmp_path):
    probe, weights = probe_of_meta(depth)
    other = {name: torch.zeros_like(value) for name, value in weights.items()}
    torch.save({"classifiers": [other, weights], "epoch": 20}, tmp_path / "ssv2.pt")
    z = torch.randn(3, 7, 48)
    for read in (
        load_attentive_probe(tmp_path / "ssv2.pt", number=1),
        load_attentive_probe(weights),
    ):
        near(read(z), probe(z))
    with pytest.raises(ValueError, match="holds 2 classifiers, none has number 2"):
        load_attentive_probe(tmp_path / "ssv2.pt", number=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("module.linear.weight"), r"lack 'out\.weight'"),
        (lambda w: w.pop("module.pooler.query_tokens"), "lack 'query'"),
        (lambda w: w.update(other=torch.zeros(1)), "hold unknown 'other'"),
        (
            lambda w: w.update({"module.pooler.query_tokens": torch.zeros(1, 2, 48)}),
            r"'query' of shape \(2, 48\), expected \(48,\)",
        ),
    ],
)
def test_probes_that_do_not_fit_are_refused(change, message):
    _, weights = probe_of_meta()
    change(weights)
    with pytest.raises(ValueError, match=message):
        load_attentive_probe(weights)


def acting():
    """Return Meta's two halves of V-JEPA 2-AC with random weights, ours, and their content."""
    encoder, _ = make()
    torch.manual_seed(0)
    predictor = BlockCausalPredictor(
        48, 7, rows=2, state_dim=7, width=24, depth=2, heads=2, normalise=True
    ).eval()
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    names = PREDICTOR | {"action": "action_encoder", "state": "state_encoder"}
    weights = metas(predictor, "module.", **names)
    weights["module.extrinsics_encoder.weight"] = torch.zeros(24, 6)
    weights["module.extrinsics_encoder.bias"] = torch.zeros(24)
    content = {"encoder": encoder_of_meta(encoder, "module."), "predictor": weights}
    return encoder, predictor, content


AC = {"image_size": (16, 24), "heads": 2, "predictor_heads": 2}


@torch.no_grad()
def test_a_file_of_v_jepa_2_ac_gives_frames_encoder_and_predictor(tmp_path):
    video_encoder, predictor, content = acting()
    torch.save(content, tmp_path / "vjepa2-ac.pt")
    encoder, read = load_vjepa2_ac(tmp_path / "vjepa2-ac.pt", **AC)
    video = torch.randn(2, 3, 3, 16, 24)
    twice = rearrange(video, "b t c y x -> (b t) 1 c y x").expand(-1, 4, -1, -1, -1)
    first = torch.arange(6).expand(6, -1)  # of a clip, all that the first two frames make
    tokens = torch.nn.functional.layer_norm(video_encoder(twice, keep=first), (48,))
    z = encoder(video)
    near(z, rearrange(tokens, "(b t) n d -> b t n d", b=2))
    action, state = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    near(read(z, action, state), predictor(z, action, state))


def test_content_of_v_jepa_2_ac_that_does_not_fit_is_refused():
    for change, message in (
        (lambda c: c.pop("predictor"), "holds no 'predictor'"),
        (lambda c: c["predictor"].update(x=torch.zeros(1)), "hold unknown 'x'"),
        (lambda c: c["predictor"].pop("module.state_encoder.weight"), r"lack 'state\.weight'"),
        (
            lambda c: c["predictor"].update({"module.predictor_proj.bias": torch.zeros(2)}),
            r"'out\.bias' of shape \(2,\), expected \(48,\)",
        ),
    ):
        content = acting()[2]
        change(content)
        with pytest.raises(ValueError, match=message):
            load_vjepa2_ac(content, **AC)
    for fact in AC:
        given = {name: value for name, value in AC.items() if name != fact}
        with pytest.raises(ValueError, match=f"no weight tells {fact}, "):
            load_vjepa2_ac(acting()[2], **given)


@torch.no_grad()
def test_statistics_of_pixels_fold_into_the_patches():
    (encoder, _), (folded, _) = make(), make()
    fold_pixel_statistics(folded)
    video = torch.rand(2, 4, 3, 16, 24)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    near(folded(video), encoder((video - mean.view(3, 1, 1)) / std.view(3, 1, 1)))

"Our masks in the real libraries: each hides exactly what the strategy chose."
import pickle

import pytest
import timm
import torch
from conftest import random_images
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from semmae.adapters import Masking, hiera_mask, lightly_ids, vitmae_noise
from semmae.core import SemmaeError, generator
from semmae.images import normalize
from semmae.masking import STRATEGIES, find_strategy
from semmae.vit import gather

PIXELS = normalize(random_images(3, 32, 32).float())
PARTS = torch.randint(0, 4, (3, 4, 4), generator=generator('parts'))
SCORES = torch.rand(3, 4, 4, generator=generator('scores'))
RATIOS = [.75, .6, .3]


def chosen(name, ratio=.75):
    maps = SCORES if STRATEGIES[name].guide == 'scores' else PARTS
    return maps, find_strategy(name, ratio)(maps, generator(0), .5)


def hides(mask, ids_keep, ids_mask):
    "Whether a mask, 1 for hidden, says what the indices say"
    return bool(mask.gather(1, ids_mask).all()) and not mask.gather(1, ids_keep).any()


@torch.no_grad()
@pytest.mark.parametrize('ratio', RATIOS)
@pytest.mark.parametrize('name', STRATEGIES)
def test_transformers_vitmae(name, ratio):
    _, (keep, hidden) = chosen(name, ratio)
    model = ViTMAEForPreTraining(ViTMAEConfig(
        image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=1, num_attention_heads=3,
        intermediate_size=48, decoder_hidden_size=32, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=32, mask_ratio=ratio))
    out = model(PIXELS, noise=vitmae_noise(keep, hidden))
    assert hides(out.mask, keep, hidden) and out.mask.sum() == hidden.numel()
    tokens, _, restore = model.vit.embeddings(PIXELS, noise=vitmae_noise(keep, hidden))
    assert tokens.shape[1] == 1 + keep.shape[1]
    assert torch.equal(restore.argsort(1)[:, :keep.shape[1]], keep), 'in our order'


def painted_over(images, ids, side):
    "Images with other pixels in some patches"
    changed, columns = images.clone(), images.shape[3]//side
    for img, some in zip(changed, ids.tolist()):
        for y, x in (divmod(i, columns) for i in some):
            img[:, side*y:side*(y + 1), side*x:side*(x + 1)] = 9.
    return changed


@torch.no_grad()
@pytest.mark.parametrize('registers', [0, 2])
@pytest.mark.parametrize('ratio', RATIOS)
def test_lightly(ratio, registers):
    "Hidden pixels are not seen, and their losses take the hidden patches"
    modules, utils = (pytest.importorskip(f'lightly.models.{name}') for name in ('modules', 'utils'))
    vit = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, depth=1, num_classes=0,
                            reg_tokens=registers)
    backbone = modules.MaskedVisionTransformerTIMM(vit=vit).eval()
    _, (keep, hidden) = chosen('blend', ratio)
    idx_keep, idx_mask = lightly_ids(keep, hidden, vit.num_prefix_tokens)
    seen = backbone.encode(PIXELS, idx_keep=idx_keep)
    assert seen.shape[1] == vit.num_prefix_tokens + keep.shape[1]
    look = lambda ids: backbone.encode(painted_over(PIXELS, ids, 8), idx_keep=idx_keep)
    assert torch.allclose(look(hidden), seen, atol=1e-5)
    assert not torch.allclose(look(keep[:, :1]), seen, atol=1e-2)
    patches = utils.patchify(PIXELS, 8)
    target = utils.get_at_index(patches, idx_mask - vit.num_prefix_tokens)
    assert torch.equal(target, gather(patches, hidden))
    whole = utils.set_at_index(torch.zeros(3, vit.num_prefix_tokens + 16, 192), idx_keep, seen)
    assert not utils.get_at_index(whole, idx_mask).any()


@pytest.mark.parametrize('ratio', RATIOS)
@pytest.mark.parametrize('name', ['blend', 'inter', 'random', 'attention_high'])
def test_stable_pretraining(name, ratio):
    methods = pytest.importorskip('stable_pretraining.methods.mae')
    masking = Masking(name, ratio, seed=3)
    vit = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, depth=1, num_classes=0)
    model = methods.MAE(vit, decoder_embed_dim=48, decoder_depth=1, decoder_num_heads=3, masking=masking)
    model.train()
    maps, _ = chosen(name)
    hide = find_strategy(name, ratio)
    for step in range(2):
        masking.look_at(maps, step, progress=.5)
        keep, hidden = hide(maps, generator(3, 'adapter', step), .5)
        out = model(PIXELS)
        assert hides(out.mask, keep, hidden) and out.num_masked == hidden.shape[1]
    out.loss.backward()
    assert vit.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0
    model.eval()(PIXELS)


@torch.no_grad()
@pytest.mark.parametrize('ratio', RATIOS)
def test_hiera(ratio):
    model = timm.create_model('hiera_tiny_224', num_classes=0).eval()
    maps = torch.randint(0, 4, (2, *model.mask_spatial_shape), generator=generator('units'))
    keep, hidden = find_strategy('inter', ratio)(maps, generator(0))
    mask = hiera_mask(keep, hidden)
    assert hides(~mask, keep, hidden)
    images = torch.randn(2, 3, 224, 224, generator=generator('images'))
    changed = painted_over(images, hidden, 224//model.mask_spatial_shape[0])
    seen = model.forward_features(images, mask=mask)
    assert seen.shape[1] == keep.shape[1]
    assert torch.allclose(model.forward_features(changed, mask=mask), seen, atol=1e-4)


@pytest.mark.parametrize('name', ['blend', 'random', 'attention_hint'])
def test_the_method_of_maes_code(name):
    "What its encoder keeps, and what its decoder puts back with `ids_restore`"
    maps, _ = chosen(name)
    masking, x = Masking(name, .75, seed=1), torch.randn(3, 16, 8)
    masking.look_at(maps, progress=.5)
    kept, mask, restore = masking.random_masking(x, .75)
    keep, hidden = find_strategy(name, .75)(maps, generator(1, 'adapter', 0), .5)
    assert hides(mask, keep, hidden) and torch.equal(kept, gather(x, keep))
    back = gather(torch.cat([kept, torch.zeros(3, 12, 8)], 1), restore)
    assert torch.equal(back, x*(1 - mask)[..., None])


def test_maps_that_are_missing_or_of_another_batch():
    masking, x = Masking('intra', .5), torch.randn(3, 16, 8)
    with pytest.raises(SemmaeError, match='look_at'):
        masking.random_masking(x, .5)
    for few, grid in ((x[:2], (4, 4)), (x, (2, 8))):
        masking.look_at(PARTS)
        with pytest.raises(SemmaeError, match='maps'):
            masking(few, *grid)
    masking.look_at(PARTS)
    with pytest.raises(SemmaeError, match='ratio'):
        masking.random_masking(x, .75)
    masking.look_at(PARTS)
    masking.random_masking(x, .5)
    with pytest.raises(SemmaeError, match='look_at'):
        masking.random_masking(x, .5)
    with pytest.raises(SemmaeError, match='nothing_like'):
        Masking('nothing_like', .5)


def test_masks_are_a_function_of_seed_and_step():
    "So a run that goes on hides what it would have hidden, and a model with its masking can be copied"
    masking, x = Masking('blend', .5, seed=2), torch.randn(3, 16, 8)
    again = pickle.loads(pickle.dumps(masking))
    def mask(masking, step):
        masking.look_at(PARTS, step, progress=.3)
        return masking(x, 4, 4).mask
    first = mask(masking, 7)
    assert not torch.equal(mask(masking, 8), first) and torch.equal(mask(again, 7), first)


def test_ranks_are_told_apart_at_any_length():
    "Among 784 patches, where bfloat16 would tie"
    maps = torch.zeros(2, 28, 28)
    keep, hidden = find_strategy('random', .75)(maps, generator(0))
    noise = vitmae_noise(keep, hidden)
    assert noise.dtype == torch.float32
    assert torch.equal(noise.argsort(1), torch.cat([keep, hidden], 1))

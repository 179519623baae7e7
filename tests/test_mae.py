"The masked autoencoder against transformers' ViTMAE: same weights and noise, same loss and reconstruction."
import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from semmae.core import SemmaeError, generator, patchify
from semmae.mae import MAE, reconstruct
from semmae.masking import choose, find_strategy, hide_among
from semmae.vit import make_encoder
from semmae.weights import load_mae

SIZES = dict(image=(32, 32), patch_size=8, embed_dim=48, depth=2, num_heads=3)


def pair(folder, norm_pixels, channels):
    "Their model, and ours opened from the folder that theirs was saved to"
    torch.manual_seed(1)
    theirs = ViTMAEForPreTraining(ViTMAEConfig(
        image_size=32, patch_size=8, num_channels=channels,
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192,
        decoder_hidden_size=32, decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2, decoder_intermediate_size=128,
        norm_pix_loss=norm_pixels, layer_norm_eps=1e-6)).eval()  # 1e-12 by default; MAE and timm have 1e-6
    for p in theirs.parameters():
        if p.requires_grad:
            p.data = torch.randn_like(p)*.1
    # transformers 5.23 leaves a fresh model's at zero
    for pos in (theirs.vit.embeddings.position_embeddings, theirs.decoder.decoder_pos_embed):
        pos.data[0] = build_2d_sinusoidal_position_embedding(
            4, 4, pos.shape[2], cls_token=True).roll(pos.shape[2]//2, 1)
    theirs.save_pretrained(folder)
    return load_mae(folder).eval(), theirs


def shrink(ours, theirs, by=.01):
    "Tokens so small that the eps of a norm shows"
    with torch.no_grad():
        for p in (ours.encoder.pos_embed, ours.decoder.pos,
                  theirs.vit.embeddings.position_embeddings, theirs.decoder.decoder_pos_embed):
            p.mul_(by)
        for m in (ours.encoder.patch_embed.proj, theirs.vit.embeddings.patch_embeddings.projection,
                  ours.decoder.embed, theirs.decoder.decoder_embed):
            m.weight.mul_(by)
            m.bias.mul_(by)
        for p in (ours.encoder.cls_token, ours.decoder.mask_token,
                  theirs.vit.embeddings.cls_token, theirs.decoder.mask_token):
            p.copy_(p*by)


@torch.no_grad()
@pytest.mark.parametrize('norm_pixels', [True, False])
@pytest.mark.parametrize('channels', [3, 1])
@pytest.mark.parametrize('small', [False, True])
def test_loss_and_reconstruction_equal_vitmae(tmp_path, norm_pixels, channels, small):
    ours, theirs = pair(tmp_path, norm_pixels, channels)
    assert torch.allclose(ours.encoder.pos_embed[0, 1:], make_encoder(**SIZES).pos_embed[0, 1:], atol=1e-6), (
        'both make the same positions')
    if small:
        shrink(ours, theirs)
    imgs = torch.randn(3, channels, 32, 32, generator=generator('imgs'))
    imgs[:, :, 8:16] = .5 + imgs[:, :, 8:16]*1e-3  # patches so flat that the eps of the loss shows
    ids_keep, ids_mask = find_strategy('random', .75)(torch.zeros(3, 4, 4), generator('masks'))
    noise = torch.zeros(3, 16).scatter_(1, torch.cat([ids_keep, ids_mask], 1),
                                        torch.linspace(0, 1, 16).expand(3, -1))
    want = theirs(imgs, noise=noise)
    loss, pred = ours(imgs, ids_keep, ids_mask)
    assert want.mask.gather(1, ids_mask).all() and want.mask.sum() == ids_mask.numel()
    assert abs(loss - want.loss) <= 1e-5*max(1, want.loss)
    hidden = want.logits.gather(1, ids_mask[..., None].expand(-1, -1, pred.shape[2]))
    assert (pred - hidden).abs().max() < 1e-5
    painted = patchify(reconstruct(ours, imgs, ids_keep, ids_mask)[1], 8)
    patches = theirs.patchify(imgs)
    if norm_pixels:
        want.logits = (want.logits*(patches.var(-1, keepdim=True) + 1e-6).sqrt()
                       + patches.mean(-1, keepdim=True))
    mask = want.mask[..., None]
    assert (painted - (patches*(1 - mask) + want.logits*mask)).abs().max() < 1e-5


@pytest.mark.parametrize('kind', ['self', 'cross'])
def test_any_size_patch_channels(kind):
    "Not square, another patch, five channels, prefix tokens: every patch is predicted, every weight learns"
    for image, patch, channels, kw in (((24, 48), 4, 5, {}), ((42, 28), 14, 1, dict(reg_tokens=4)),
                                       ((16, 16), 4, 3, dict(class_token=False, global_pool='avg'))):
        encoder = make_encoder(image=image, channels=channels, patch_size=patch, embed_dim=48, depth=1,
                               num_heads=3, **kw)
        mae = MAE(encoder, kind=kind, width=32, depth=1, heads=2)
        L = mae.grid[0]*mae.grid[1]
        ids_keep, ids_mask = find_strategy('random', ratio=.6)(torch.zeros(2, *mae.grid), generator('masks'))
        loss, pred = mae(torch.randn(2, channels, *image, generator=generator(patch)), ids_keep, ids_mask)
        assert pred.shape == (2, L - int(L*.4), patch*patch*channels)
        loss.backward()
        assert not [n for n, p in mae.named_parameters()
                    if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)]


def test_a_cross_decoder_predicts_a_share_as_it_would_among_all():
    mae = MAE(make_encoder(**SIZES), kind='cross', width=32, depth=2, heads=2, share=.25)
    imgs = torch.randn(2, 3, 32, 32)
    ids_keep, ids_mask = find_strategy('random', .75)(torch.zeros(2, 4, 4), generator('masks'))
    some = mae(imgs, ids_keep, ids_mask)[1]
    mae.share = 1.
    assert some.shape[1] == 3 and torch.allclose(mae(imgs, ids_keep, ids_mask)[1][:, :3], some, atol=1e-6)


def test_a_cross_decoder_looks_at_every_kept_token_and_at_no_hidden_one():
    mae = MAE(make_encoder(**SIZES), kind='cross', width=32, depth=1, heads=2)
    ids_keep, ids_mask = find_strategy('random', .75)(torch.zeros(2, 4, 4), generator('masks'))
    tokens = torch.randn(2, 5, 48)
    pred = mae.decoder(tokens, ids_keep, ids_mask)
    for i in range(5):
        changed = tokens.clone()
        changed[:, i] = torch.randn(2, 48)
        assert ((mae.decoder(changed, ids_keep, ids_mask) - pred).abs().amax(2) > 1e-6).all()
    assert torch.allclose(mae.decoder(tokens, ids_keep, ids_mask[:, :2]), pred[:, :2], atol=1e-6)


def test_masks_that_do_not_fit():
    mae, imgs = MAE(make_encoder(**SIZES), width=32, depth=1, heads=2), torch.randn(2, 3, 32, 32)
    for batch, grid in ((2, (2, 4)), (2, (5, 5)), (3, (4, 4))):
        masks = find_strategy('random', .75)(torch.zeros(batch, *grid), generator('masks'))
        for f in (mae, lambda *x: reconstruct(mae, *x)):
            with pytest.raises(SemmaeError, match='4×4'):
                f(imgs, *masks)


@pytest.mark.parametrize('kind', ['self', 'cross'])
def test_patches_that_take_no_part_change_nothing(kind):
    mae = MAE(make_encoder(**SIZES), kind=kind, width=32, depth=2, heads=2)
    grid = torch.zeros(3, 4, 4)
    imgs = torch.randn(3, 3, 32, 32, generator=generator('imgs'), requires_grad=True)
    some = choose(grid, 'random', .5, generator('choice'))
    masks = hide_among(find_strategy('random', .5), some, grid, generator('masks'))
    with pytest.raises(SemmaeError):
        mae(imgs, *masks)  # half of the patches, and nobody said that half takes part
    mae.part = 8
    loss, pred = mae(imgs, *masks)
    loss.backward()
    changed = patchify(imgs.grad, 8).abs().amax(2) > 0
    assert pred.shape[1] == 4 and torch.equal(changed, torch.zeros(3, 16).scatter(1, some, 1).bool())
    shown, painted = (patchify(x, 8).abs().amax(2) > 0 for x in reconstruct(mae, imgs.detach(), *masks))
    assert torch.equal(painted, changed) and shown.sum() == 3*4

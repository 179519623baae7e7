"What an encoder says of an image, against timm itself."
import pytest
import timm
import torch
from conftest import random_images
from safetensors.torch import save_file

from semmae.core import SemmaeError
from semmae.images import normalize
from semmae.vit import block_output, block_outputs, make_encoder
from semmae.weights import load_encoder, open_encoder, save_encoder

IMAGES = random_images(3, 48, 32)
KINDS = [dict(), dict(reg_tokens=3), dict(class_token=False, global_pool='avg'),
         dict(class_token=False, global_pool='avg', reg_tokens=2), dict(no_embed_class=True),
         dict(qk_norm=True)]


def fresh(**kw):
    return make_encoder(image=(48, 32), patch_size=8, embed_dim=48, depth=3, num_heads=3, **kw).eval()


@pytest.mark.parametrize('kw', KINDS, ids=str)
@pytest.mark.parametrize('block', [1, 2, 3])
def test_tokens_are_those_that_timm_gives(kw, block):
    vit = fresh(**kw)
    peer = vit.forward_intermediates(normalize(IMAGES.float()), indices=[block - 1],
                                     return_prefix_tokens=True, norm=True, output_fmt='NLC',
                                     intermediates_only=True)[0]
    patches, prefix = peer if isinstance(peer, tuple) else (peer, None)
    seen = block_output(vit, IMAGES, block)
    assert torch.allclose(seen.patches, vit.fc_norm(patches).view(3, 6, 4, 48), atol=1e-5)
    mean = vit.fc_norm(patches).mean(1)
    token = prefix[:, 0] if vit.has_class_token else mean
    assert torch.allclose(seen.class_token, token, atol=1e-5)


@pytest.mark.parametrize('kw', KINDS, ids=str)
def test_attention_is_what_the_block_multiplies_its_values_with(kw):
    "timm drops out of the attention's weights by name: there they can be seen"
    vit, kept = fresh(**kw), []
    for b in vit.blocks:
        b.attn.fused_attn = False
    vit.blocks[1].attn.attn_drop.register_forward_hook(lambda m, i, o: kept.append(o))
    vit(normalize(IMAGES.float()))
    rows = kept[0][:, :, 0] if vit.has_class_token else kept[0][:, :, vit.num_prefix_tokens:].mean(2)
    assert torch.allclose(block_output(vit, IMAGES, block=2).attention,
                          rows[..., vit.num_prefix_tokens:].view(3, 3, 6, 4), atol=1e-6)


def test_an_encoder_of_timms_opens_by_name_and_file_at_any_size(tmp_path):
    vit = timm.create_model('vit_tiny_patch16_224', num_classes=0, img_size=64)
    save_file(vit.state_dict(), tmp_path/'w.safetensors')
    same = open_encoder('vit_tiny_patch16_224', tmp_path/'w.safetensors', image=(64, 64))
    assert all(torch.equal(a, b) for a, b in zip(vit.state_dict().values(), same.state_dict().values(),
                                                 strict=True))
    wide = open_encoder('vit_tiny_patch16_224', tmp_path/'w.safetensors', image=(64, 128))
    assert block_output(wide, IMAGES).patches.shape == (3, 4, 8, 192)
    assert torch.equal(wide.blocks[0].attn.qkv.weight, vit.blocks[0].attn.qkv.weight)
    assert block_output(same, IMAGES).class_token.shape == (3, 192)
    assert not any(p.requires_grad for p in same.parameters())
    assert same.stats[0] == [.5, .5, .5], 'the colours that this model was made for'
    save_encoder(wide, tmp_path/'again.safetensors')
    again = load_encoder(tmp_path/'again.safetensors').eval()
    assert torch.equal(block_output(again, IMAGES).patches, block_output(wide, IMAGES).patches), (
        'colours and size are kept in the file')


def test_our_own_opens_at_another_size(tmp_path):
    save_encoder(fresh(), tmp_path/'e.safetensors')
    assert torch.equal(block_output(open_encoder(weights=tmp_path/'e.safetensors'), IMAGES).patches,
                       block_output(load_encoder(tmp_path/'e.safetensors').eval(), IMAGES).patches)
    assert block_output(open_encoder(weights=tmp_path/'e.safetensors', image=(96, 64)),
                IMAGES).patches.shape == (3, 12, 8, 48)


@pytest.mark.parametrize('kw, named', [
    (dict(), 'teacher.name'),
    (dict(name='vit_tinny', weights='e.safetensors'), 'vit_tinny'),
    (dict(name='vit_small_patch16_224', weights='e.safetensors'), 'e.safetensors'),
    (dict(name='vit_small_patch16_224', weights='none.pth'), 'none.pth'),
    (dict(weights='e.safetensors', image=(50, 50)), '50×50'),
    (dict(weights='plain.safetensors'), 'plain.safetensors'),
    (dict(weights='plain.safetensors', name='vit_tiny_patch16_224'), 'plain.safetensors'),
    (dict(name='vit_tiny_patch16_224', weights='other.safetensors'), 'other.safetensors'),
    (dict(name='resnet18'), 'resnet18')])
def test_what_is_wrong_is_named(tmp_path, kw, named):
    save_encoder(fresh(), tmp_path/'e.safetensors')
    save_file(fresh().state_dict(), tmp_path/'plain.safetensors')
    save_file({'weight': torch.zeros(3)}, tmp_path/'other.safetensors')
    if 'weights' in kw:
        kw = kw | dict(weights=tmp_path/kw['weights'])
    with pytest.raises(SemmaeError, match=named):
        open_encoder(**kw)


@pytest.mark.parametrize('name', ['vit_base_patch16_rpn_224', 'vit_dwee_patch16_reg1_gap_256'])
def test_attention_of_another_kind_is_refused(name):
    "Rather than read as what it is not"
    vit = make_encoder(name, image=(32, 32), depth=1)
    with pytest.raises(SemmaeError, match='teacher.name'):
        block_output(vit, IMAGES)


def test_another_number_of_channels_is_named():
    with pytest.raises(SemmaeError, match='data.channels'):
        block_output(fresh(channels=1), IMAGES)


def test_several_blocks_in_one_pass():
    vit = fresh()
    for block, seen in zip((3, 1, None), block_outputs(vit, IMAGES, (3, 1, None))):
        assert all(torch.equal(a, b) for a, b in zip(seen, block_output(vit, IMAGES, block)))


def test_a_model_that_no_network_brings_is_named(monkeypatch):
    def offline(*a, **kw):
        raise OSError('Name or service not known')
    monkeypatch.setattr('timm.create_model', offline)
    with pytest.raises(SemmaeError, match='vit_tiny_patch16_224'):
        open_encoder('vit_tiny_patch16_224')


def test_a_block_that_is_not_there():
    with pytest.raises(SemmaeError, match='parts.block'):
        block_output(fresh(), IMAGES, 4)

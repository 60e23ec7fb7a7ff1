"""PEFT as a peer: it loads our adapter files and we load its own, with the same logits. Skipped
where PEFT is not installed.
"""

import warnings

import pytest
import torch
import toy

from hanorec import export
from hanorec.base.errors import InputError
from hanorec.lora.files import save_adapter, save_policy
from hanorec.lora.layer import lora_layers
from hanorec.lora.loading import attach_adapter, attach_policy
from hanorec.mllm.collate import collate
from hanorec.mllm.forward import forward
from hanorec.mllm.load import load_backbone
from hanorec.scoring import answer_logits

peft = pytest.importorskip("peft")


def fresh(backbone):
    """The same checkpoint once more, without adapters."""
    return load_backbone(backbone.path, "float32", "cpu")


@pytest.fixture
def logits(catalog, gallery):
    """logits(backbone) -> (M, V) at the answer positions of a prompt with images."""
    def compute(backbone):
        batch = collate(
            backbone, [toy.ranking_row(backbone, catalog, gallery[backbone.family])],
            gallery[backbone.family],
        )
        with torch.no_grad():
            return answer_logits(forward(backbone, batch), batch)
    return compute


def peft_loads(backbone, folder):
    """PEFT injects the adapter into the very modules of the model, so our forward then runs PEFT's
    layers.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of keys that it misses
        wrapped = peft.PeftModel.from_pretrained(backbone.model, str(folder))
    assert not lora_layers(backbone.model) and not wrapped.training
    return wrapped


def test_peft_loads_our_adapter(backbone, logits, tmp_path):
    layers = toy.busy_lora(backbone.model, seed=3, r=4, alpha=10.0, dropout=0.1)
    save_adapter(backbone.model, tmp_path, backbone.path)
    other = fresh(backbone)
    plain = logits(other)
    wrapped = peft_loads(other, tmp_path)
    theirs = [module for module in wrapped.modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert len(theirs) == len(layers)  # no linear more (vision tower), none less
    torch.testing.assert_close(logits(other), logits(backbone), atol=1e-5, rtol=1e-5)
    assert (logits(other) - plain).abs().max() > 1e-2


def test_peft_loads_the_collapsed_stack(backbone, logits, tmp_path):
    toy.busy_lora(backbone.model, seed=3, r=4, alpha=10.0)
    save_adapter(backbone.model, tmp_path / "sft", backbone.path)
    toy.busy_lora(backbone.model, seed=4, r=2, alpha=3.0)
    save_policy(backbone.model, tmp_path / "dpo", backbone.path, below=tmp_path / "sft")
    export.main([
        "--model", backbone.path, "--adapter", str(tmp_path / "dpo"),
        "--out", str(tmp_path / "one"),
    ])
    other = fresh(backbone)
    peft_loads(other, tmp_path / "one")
    torch.testing.assert_close(logits(other), logits(backbone), atol=1e-5, rtol=1e-5)
    # Negative control: the top adapter alone is not the policy.
    top = fresh(backbone)
    peft_loads(top, tmp_path / "dpo")
    assert (logits(top) - logits(backbone)).abs().max() > 1e-2


def test_transformers_loads_what_is_exported(backbone, logits, tmp_path):
    """By `load_adapter`, as the card says."""
    toy.busy_lora(backbone.model, seed=3, r=4, alpha=10.0)
    save_adapter(backbone.model, tmp_path / "sft", backbone.path)
    export.main([
        "--model", backbone.path, "--adapter", str(tmp_path / "sft"),
        "--out", str(tmp_path / "one"),
    ])
    card = (tmp_path / "one" / "README.md").read_text()
    assert 'model.load_adapter("THIS_FOLDER")' in card
    other = fresh(backbone)
    other.model.load_adapter(str(tmp_path / "one"))
    other.model.eval()
    torch.testing.assert_close(logits(other), logits(backbone), atol=1e-5, rtol=1e-5)
    other.model.disable_adapters()
    assert (logits(other) - logits(backbone)).abs().max() > 1e-2


def peft_saves(backbone, folder, **options):
    """An adapter made and saved by PEFT, with random weights; the model keeps it."""
    config = peft.LoraConfig(
        r=4, lora_alpha=10, lora_dropout=0.1, task_type="CAUSAL_LM",
        **{
            "target_modules": (
                r"model\.language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|"
                r"down_proj)"
            )
        }
        | options,
    )
    wrapped = peft.get_peft_model(backbone.model, config)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    wrapped.eval()
    wrapped.save_pretrained(str(folder))


def test_we_load_an_adapter_of_peft(backbone, logits, tmp_path):
    peft_saves(backbone, tmp_path)
    other = fresh(backbone)
    plain = logits(other)
    attach_policy(other.model, tmp_path)
    other.model.eval()
    layer = next(iter(lora_layers(other.model).values()))
    assert (layer.r, layer.scale, layer.dropout) == (4, 2.5, 0.1)
    torch.testing.assert_close(logits(other), logits(backbone), atol=1e-5, rtol=1e-5)
    assert (logits(other) - plain).abs().max() > 1e-2


@pytest.mark.parametrize(("options", "message"), [
    ({"use_dora": True}, "use_dora = True"),
    ({"use_rslora": True}, "use_rslora = True"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern = "),
    # 5 of 7 linears, A and B, 2 layers
    ({"target_modules": r"model\.language_model\..*\.(q_proj|v_proj)"}, "20 tensors are missing"),
])
def test_variants_that_we_do_not_compute_are_refused(qwen, tmp_path, options, message):
    peft_saves(qwen, tmp_path, **options)
    with pytest.raises(InputError, match=message):
        attach_adapter(fresh(qwen).model, tmp_path)

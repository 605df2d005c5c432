"""A trained fold on disk: stock PEFT opens it, and reloading reproduces the scores."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.refusals import refuses
from support.toy import Recorder, Toy, toy_base, train_config
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from raycv.model.checkpoint import load_adapter, read_info, save_checkpoint
from raycv.model.loading import load_classifier
from raycv.training.loop import FoldTrainer

TRAIN, VAL = np.arange(30), np.arange(30, 48)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A toy fold trained for an epoch, its scores and its checkpoint folder."""
    folder = tmp_path_factory.mktemp("saved")
    toy = Toy(toy_base(folder))
    model = toy.model(dropout=0.1)
    loop = FoldTrainer(model, toy.encoded, train_config(epochs=1), "fp32", Recorder())
    scores = loop.fit(TRAIN, VAL).val_scores
    info = toy.info(threshold=0.37, criteria={"C0": "SLEEP_ISSUES", "C1": None}, fold=3)
    save_checkpoint(folder / "checkpoint", model, toy.tokenizer, info)
    return toy, scores, folder / "checkpoint", info


def logits_of(model, toy):
    ids = torch.from_numpy(toy.encoded.input_ids[VAL].astype(np.int64))
    mask = (torch.arange(ids.shape[1])[None] < torch.from_numpy(toy.encoded.lengths[VAL])[:, None]).long()
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=mask).logits


def test_reloaded_scores_are_the_trained_ones(saved):
    toy, scores, folder, _ = saved
    model = load_adapter(load_classifier(toy.base, toy.tokenizer, torch.float32, seed=99), folder)
    reloaded = torch.softmax(logits_of(model, toy).double(), -1)[:, 1].numpy()
    np.testing.assert_allclose(reloaded, scores, atol=1e-6)
    assert np.ptp(scores) > 1e-3


def test_stock_peft_opens_it_with_the_same_logits(saved):
    toy, scores, folder, _ = saved
    base = AutoModelForSequenceClassification.from_pretrained(
        toy.base.path, num_labels=2, pad_token_id=toy.tokenizer.pad_token_id, dtype=torch.float32
    )
    stock = torch.softmax(logits_of(PeftModel.from_pretrained(base, folder), toy).double(), -1)[:, 1].numpy()
    np.testing.assert_allclose(stock, scores, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id == toy.tokenizer.pad_token_id


def test_what_peft_keeps_as_a_set_is_written_in_order(saved):
    """Or the same training would leave other bytes, and other checksums, in each process."""
    written = json.loads((saved[2] / "adapter_config.json").read_text())["target_modules"]
    assert written == sorted(written)
    assert len(written) == 7


def test_manifest_round_trip_and_no_text(saved):
    _, _, folder, info = saved
    assert read_info(folder) == info
    manifest = json.loads((folder / "raycv.json").read_text())
    assert manifest["labels"] == {"0": "unmatched", "1": "matched"}
    assert {"raycv", "torch", "transformers", "peft"} <= set(manifest["versions"])
    adapter = json.loads((folder / "adapter_config.json").read_text())
    assert adapter["use_dora"] is True
    assert adapter["task_type"] == "SEQ_CLS"
    assert adapter["base_model_name_or_path"] == info.base_model
    assert not list(folder.glob("*.bin"))


def test_what_is_no_checkpoint_is_refused(saved, tmp_path):
    with refuses("run-missing", f"{tmp_path} ", "no raycv.json"):
        read_info(tmp_path)
    (tmp_path / "raycv.json").write_text("{")
    with refuses("checkpoint-damaged", f"{tmp_path / 'raycv.json'} is damaged", "JSON"):
        read_info(tmp_path)
    (tmp_path / "raycv.json").write_text('{"format": 99}')
    with refuses("package-version", tmp_path / "raycv.json", "format 99"):
        read_info(tmp_path)


def copied(folder, tmp_path):
    """A copy without checksums, as older versions wrote it."""
    shutil.copytree(folder, tmp_path / "copy")
    edit_json(tmp_path / "copy" / "raycv.json", lambda values: values.pop("sha256", None))
    return tmp_path / "copy"


def edit_json(file, change):
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def opened(toy, folder):
    return load_adapter(load_classifier(toy.base, toy.tokenizer, torch.float32, seed=99), folder)


def without_b(tensors):
    return {name: tensor for name, tensor in tensors.items() if "lora_B" not in name}


def with_nan(tensors):
    return {name: tensor * float("nan") for name, tensor in tensors.items()}


@pytest.mark.parametrize(("change", "named"), [(without_b, "lora_B"), (with_nan, "NaN or infinity")])
def test_an_adapter_that_lacks_tensors_or_holds_nan_is_refused(saved, tmp_path, change, named):
    folder = copied(saved[2], tmp_path)
    weights = folder / "adapter_model.safetensors"
    save_file(change(load_file(weights)), weights)
    with refuses("checkpoint-damaged", folder, "adapter_model.safetensors", named):
        opened(saved[0], folder)


def test_an_edited_adapter_is_refused_by_its_checksum_and_an_older_one_opens(saved, tmp_path):
    opened(saved[0], copied(saved[2], tmp_path))
    folder = shutil.copytree(saved[2], tmp_path / "edited")
    edit_json(folder / "adapter_config.json", lambda values: values.update(lora_alpha=80))
    with refuses("checkpoint-damaged", folder, "adapter_config.json", "SHA-256"):
        opened(saved[0], folder)


def test_an_adapter_of_another_kind_is_refused(saved, tmp_path):
    folder = copied(saved[2], tmp_path)
    edit_json(folder / "adapter_config.json", lambda values: values.update(peft_type="IA3"))
    with refuses("checkpoint-damaged", f"The adapter in {folder}"):
        opened(saved[0], folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("threshold", float("nan")),
        ("threshold", True),
        ("threshold", "0.1"),
        ("threshold", 1.5),
        ("fold", "../../x"),
        ("criteria_dir", 5),
        ("base_model", 7),
        ("precision", "fp7"),
        ("rules.long_post", "evil"),
        ("rules.max_length", "x"),
        ("rules.max_length", 10**12),
        ("rules.head_fraction", "a"),
        ("rules.stride_fraction", float("nan")),
    ],
)
def test_a_value_that_is_not_what_it_should_be_is_named(saved, tmp_path, key, value):
    section, _, name = key.rpartition(".")
    file = copied(saved[2], tmp_path) / "raycv.json"
    edit_json(file, lambda values: (values[section] if section else values).update({name: value}))
    with refuses("checkpoint-damaged", f"{file} is damaged: {section or name}", name):
        read_info(file.parent)


def test_json_that_is_nested_too_deeply_is_refused(tmp_path):
    (tmp_path / "raycv.json").write_text("[" * 100_000)
    with refuses("checkpoint-damaged", f"{tmp_path / 'raycv.json'} is damaged"):
        read_info(tmp_path)

import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

from distributed_rerank.errors import BadInput
from distributed_rerank.models import weights


def test_read_state_dict_formats_and_nesting_give_the_same_tensors(tmp_path):
    state = nn.Linear(3, 2).state_dict()
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pth")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "c.pt")
    torch.save({"model": state}, tmp_path / "d.ckpt")
    for name in ("a.safetensors", "b.pth", "c.pt", "d.ckpt"):
        read = weights.read_state_dict(tmp_path / name)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[key], state[key]) for key in state), name


def test_read_state_dict_never_runs_code_of_a_pickle(tmp_path):
    touched = tmp_path / "touched"

    class Touch:
        def __reduce__(self):
            return (open, (str(touched), "w"))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"weight": Touch()}))
    with pytest.raises(BadInput, match=r"evil\.pth cannot be read as plain tensors"):
        weights.read_state_dict(tmp_path / "evil.pth")
    assert not touched.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pth", None, "does not exist"),
        ("text.txt", b"hello", "must end in"),
        ("cut.safetensors", b"\x08\x00", "cannot be read"),
        ("cut.pth", b"PK\x03\x04", "cannot be read"),
    ],
)
def test_read_state_dict_bad_file_is_refused_by_name(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        weights.read_state_dict(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_read_state_dict_without_tensors_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(BadInput, match="holds no state dict"):
        weights.read_state_dict(tmp_path / "list.pth")


def test_strip_wrappers_nested_prefixes_lead_to_known_names_only():
    state = {
        "module.model.conv.weight": torch.ones(1),
        "model.other": torch.ones(1),
        "model.kept": torch.ones(1),
    }
    assert set(weights.strip_wrappers(state, {"conv.weight", "model.kept"})) == {
        "conv.weight",
        "model.other",
        "model.kept",
    }


def test_load_exactly_misfit_names_missing_unexpected_and_shapes():
    with pytest.raises(BadInput) as caught:
        weights.load_exactly(nn.Linear(3, 2), {"weight": torch.zeros(2, 4), "gain": torch.zeros(1)}, "w.pth")
    message = str(caught.value)
    for part in ("w.pth", "1 missing (bias)", "1 unexpected (gain)", "weight is (2, 4) in place of (2, 3)"):
        assert part in message


def test_load_exactly_absent_batch_norm_counter_is_allowed():
    norm, other = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    nn.init.uniform_(other.weight)
    state = {name: value for name, value in other.state_dict().items() if name != "num_batches_tracked"}
    weights.load_exactly(norm, state, "w.pth")
    assert torch.equal(norm.weight, other.weight)


def test_digest_of_state_depends_on_values_and_not_on_order():
    a, b = torch.arange(3.0), torch.tensor(2)
    assert weights.digest_of_state({"a": a, "b": b}) == weights.digest_of_state({"b": b, "a": a})
    assert weights.digest_of_state({"a": a, "b": b}) != weights.digest_of_state({"a": a + 1, "b": b})
    assert weights.digest_of_state({"a": a}) != weights.digest_of_state({"a": a.reshape(3, 1)})

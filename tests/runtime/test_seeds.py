import torch

from library.runtime import seeds


def test_a_stream_depends_on_its_whole_address_and_on_nothing_else():
    first = torch.randn(4, generator=seeds.generator("cpu", 7, "noise", 3, 0))
    torch.manual_seed(123)  # whatever others draw
    torch.randn(100)
    assert torch.equal(first, torch.randn(4, generator=seeds.generator("cpu", 7, "noise", 3, 0)))
    others = [(8, "noise", 3, 0), (7, "layers", 3, 0), (7, "noise", 4, 0), (7, "noise", 3, 1), (7, "noise", 30)]
    assert all(not torch.equal(first, torch.randn(4, generator=seeds.generator("cpu", *a))) for a in others)


def test_the_derivation_is_fixed():
    """Resuming with a later version must give the same streams: this number may not change."""
    assert seeds.derive(42, "noise", 1) == 8995845318521665060


def test_addresses_may_hold_names_that_are_no_unicode():
    assert seeds.derive(42, "caf\udce9.png") != seeds.derive(42, "caf\udce8.png")

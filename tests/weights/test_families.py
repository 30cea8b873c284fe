"""Every golden case is known to exactly one family of transformers and encoders, by its config.json
and by its names alone, and a card gives back the config."""

import dataclasses
import importlib
import json

import pytest

from tests.parity.golden import load_case, needs_golden

FAMILIES = [importlib.import_module(f"sora_jax.weights.{name}").FAMILY for name in (
    "wan_dit", "dit_paper", "cogvideox_dit", "mmdit_block", "text_encoders")]
CASES = {"wan_dit_t2v": "wan_dit", "wan_dit_i2v": "wan_dit", "dit_paper_original": "dit",
         "cogvideox_dit": "cogvideox_dit", "mmdit_block": "mmdit_block",
         "t5_encoder": "text_encoder", "umt5_encoder": "text_encoder", "clip": "text_encoder",
         "siglip": "text_encoder"}


@needs_golden
@pytest.mark.parametrize("name", CASES)
def test_one_family_knows_the_case_and_its_card_gives_back_the_config(name):
    case = load_case(name)
    for published in (case.config, {}):
        found = [x for x in FAMILIES if x.recognises(published, case.tensors.keys())]
        assert [x.name for x in found] == [CASES[name]]
    config = found[0].config(case.config, {})
    card = json.loads(json.dumps({"config": dataclasses.asdict(config)}))
    assert found[0].from_card(card, "card") == config

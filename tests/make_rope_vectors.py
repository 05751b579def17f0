#!/usr/bin/env python3
"""Writes data/rope-yarn.json: frequencies and magnitudes of YaRN as transformers computes them.

    pip install numpy transformers==5.24.0 --no-deps && python3 make_rope_vectors.py

Runs transformers' own function. It needs only a handful of torch's functions, which numpy stands in for here, in the same
float32, so that torch need not be installed.
"""
import importlib.util
import json
import pathlib
import sys
import types

import numpy as np


class Array(np.ndarray):
    def to(self, device=None, dtype=None):
        return self.astype(dtype)


def torch():
    stand_in = types.ModuleType("torch")
    stand_in.float = stand_in.float32 = np.float32
    stand_in.int64 = np.int64
    stand_in.arange = lambda *range_, dtype=np.int64: np.arange(*range_).astype(dtype).view(Array)
    stand_in.clamp = np.clip
    return stand_in


def rope_utils():
    """transformers' file alone, without what its package imports."""
    sys.modules["torch"] = torch()
    sys.modules["transformers"] = types.ModuleType("transformers")
    utils = types.ModuleType("transformers.utils")
    utils.is_torch_available = lambda: True
    utils.logging = types.SimpleNamespace(get_logger=lambda name: None)
    sys.modules["transformers.utils"] = utils
    places = [pathlib.Path(path) / "transformers/modeling_rope_utils.py" for path in sys.path]
    path = next(place for place in places if place.exists())
    spec = importlib.util.spec_from_file_location("transformers.modeling_rope_utils", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main():
    yarn = rope_utils().ROPE_INIT_FUNCTIONS["yarn"]
    cases = []
    for dimensions, base, original, factor, more in [
        (128, 1e6, 32768, 4.0, {}),
        (128, 1e6, 8192, 16.0, {}),
        (128, 1e6, 4096, 64.0, {}),
        (64, 1e4, 4096, 16.0, {"beta_fast": 16.0, "beta_slow": 2.0}),
        (256, 1e4, 2048, 4.0, {"attention_factor": 1.25}),
    ]:
        parameters = {"rope_theta": base, "factor": factor, "original_max_position_embeddings": original, **more}
        config = types.SimpleNamespace(
            rope_parameters=parameters,
            head_dim=dimensions,
            hidden_size=dimensions,
            num_attention_heads=1,
            max_position_embeddings=int(original * factor),
            standardize_rope_params=lambda: None,
        )
        frequencies, magnitude = yarn(config, "cpu")
        cases.append({
            "dimensions": dimensions, "base": base, "original_context": original, "factor": factor, **more,
            "magnitude": magnitude,
            "frequencies": [float(f) for f in frequencies],
        })
    out = pathlib.Path(__file__).parent / "data/rope-yarn.json"
    out.write_text(json.dumps(cases, indent=None, separators=(",", ":")).replace('{"dim', '\n{"dim') + "\n")


main()

"""Choose plans with numpy and onnxruntime alone: python decide_with_onnx.py routers.onnx prompts.npz 0.9."""

import json
import sys

import numpy as np
import onnxruntime

# token_ids and attention_mask, shape (batch, tokens), and the states entering each layer that decides, shape (batch,
# tokens, hidden), float32, as layer_20 for layer 20: what has run before a later one is what the earlier ones chose.
prompts = np.load(sys.argv[2])
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
layers = json.loads(session.get_modelmeta().custom_metadata_map["dynadepth.layers"])
prime, mix = 2**31 - 1, []
for ids, mask in zip(prompts["token_ids"], prompts["attention_mask"], strict=True):
    total, power = 0, 1
    for token in ids[mask == 1].tolist():
        power = power * 1_103_515_245 % prime
        total = (total + (token + 1) * power) % prime
    mix.append((48_271 * total % prime >> 7) / 2**24)
feed = {"mix": np.array(mix, np.float32), "budget": np.array(sys.argv[3], np.float32)}
feed["attention_mask"], plan = prompts["attention_mask"], np.zeros(len(mix), np.int64)
for step, layer in enumerate(layers):
    feed["hidden_states"] = prompts[f"layer_{layer}"]
    if len(layers) > 1:
        feed |= {"step": np.array(step, np.int64), "earlier": plan}
    plan, actions = session.run(["plan", "actions"], feed)
for index, row in zip(plan, actions, strict=True):
    print(index, "".join(map(str, row)))

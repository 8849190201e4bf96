"""The ten lines of the README: a Hugging Face model that generates on a 4-bit cache."""

import kvc_compile as kvc
from kvc_compile.demo_model import load

model, tokenizer = load()  # SmolLM2-135M-Instruct; any supported transformers model does

kvc.compile(model, "kivi-4bit")  # or a dict, or the path of a spec file

inputs = tokenizer("Gravity is", return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=40, do_sample=False, cache_implementation="static")
print(tokenizer.decode(out[0]))
print(kvc.report(model))

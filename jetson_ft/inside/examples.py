"""What is inspected where nothing else is given. For the command line: without heavy imports."""

from __future__ import annotations

from jetson_ft.inference.generate import Sampling

SENTENCE = "The cat sat on the mat because it was tired. 猫坐在垫子上，因为它累了。"
QUESTION = "中国的首都是哪里？"
CAPITALS = [("Japan", "Tokyo"), ("Italy", "Rome"), ("China", "Beijing")]
CAPITALS_QUESTION = "France"
# Each of its settings but the last has an effect, unlike those of `Sampling()`.
SAMPLING = Sampling(temperature=0.7, top_k=12, top_p=0.9, repetition_penalty=1.0)

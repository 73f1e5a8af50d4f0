"""The benchmark: train the same rows in different ways on this machine, and compare.

`variants` lists the ways to train, `workload` has what they all train, `runner` starts a process
for each variant in each round, `table` compares what they measured. Start reading at
`runner.bench`. Benchmarks that are scripts of their own are in benchmarks/.
"""

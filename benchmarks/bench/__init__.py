"""One comparison of speed: every row runs this package and its peers on the same work, in turns, in one process.

  python -m benchmarks.bench --output=runs/bench               # on the CPU, or on the GPU if there is one
  python -m benchmarks.bench --rows=exact_search,kmeans --rounds=7
  python -m benchmarks.bench --list

`harness` runs a row, `limits` measures what the machine can do, `report` writes the table and the JSON file, and
`rows` names the rows, each of which is a function of one of the modules `*_rows`.
"""

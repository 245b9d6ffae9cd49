"""The guest: the one program that runs inside every environment. Standard library and the engine's library only.

Protocol, version 1. The host copies this package to BUNDLE/spark_ray_worker and starts, in the environment,

    python -m spark_ray_worker ATTEMPT_FOLDER        (PYTHONPATH=BUNDLE)

ATTEMPT_FOLDER/request.json   read    see `protocol.REQUEST_FIELDS`
ATTEMPT_FOLDER/worker.log     append  stdout and stderr of everything, from the first line on
ATTEMPT_FOLDER/observations.jsonl  append  one line an observation, as it goes
ATTEMPT_FOLDER/result.json    write   last, by rename; the host's result.py describes it

Standard output carries control lines only, each `@spark_ray WORD ...`; standard input carries the answers:

    guest: @spark_ray ready PID        host: looks at the process from outside, answers `go`
    guest: @spark_ray settle           host: applies again what must hold as the engine reads memory, answers `go`
    guest: @spark_ray phase NAME       host: reads its counters at the same moment, answers `go`

The first process is a supervisor that does nothing but wait: when standard input closes, the host is gone and it
kills every descendant; when the worker ends, it ends with the same status (128 + n after signal n).
Exit status 0 means "result.json says what happened", a failed engine included. The worker states facts; the host
derives the outcome.
"""

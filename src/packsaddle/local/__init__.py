"""Local updates of any optimizer, exchanged every H steps: `updates` has `LocalUpdates`, so read it first.

- `fragment`: parameters exchanged together; `anchor`: where they last agreed, and x's moves; `escape`: its check
- `options`: overlap, workers, the outer optimizer; `participation`: weights and samples of workers
- `inner`, `start`, `lockstep`: the optimizer inside, and checks; `outcomes`: rejected rounds
- `elastic`: workers that come and go
"""

"""`quartet train` as a loop of your own: the same weights and the same sampled ids, bit for bit."""

import sys

from grpo import Session, TrainConfig

with Session.open(TrainConfig.read(sys.argv[1], **dict(word.split("=", 1) for word in sys.argv[2:]))) as session:
    for step in session.run.steps():
        batch = session.prepare(session.draw(step))
        metrics = session.learn(batch)  # session.forward_backward(batch) | session.optim_step(), once or more often
        session.sync_weights()
        session.record(step, metrics)
        session.save_if_due(step)
        session.evaluate_if_due(step)
    session.finish()

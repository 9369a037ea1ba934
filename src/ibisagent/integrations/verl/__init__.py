"""ibisagent inside verl (0.9), for reinforcement learning on 8 to 64 GPUs: `agent_loop` and `reward`.

Nothing here is imported by the rest of the package, and only `agent_loop` needs verl. Data come from `ibisagent
data build` (format "verl"), settings and launch script are in recipes/verl.
"""

"""The machine: which board, memory and power modes it has, its sensors, and the doctor.

`detect` describes this machine and declares what a Jetson and an NVIDIA GPU are recognized by;
`boards` has the specifications of Orin modules, for planning. `cgroup` reads the memory limits of
containers and services. `monitor` watches `sensors` during a run. What a run needs of the memory is
not here but in `training.planner`. Start with `detect`.
"""

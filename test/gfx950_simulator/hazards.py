def check_wait_states(p): pass

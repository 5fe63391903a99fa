def write_report(workdir): return None

"""The machine around a run.

- `storage`: paths here and in buckets, files that appear whole or not at all, copies and mirrors.
- `json_files`: the one way in which JSON is written.
- `lease`: keeps a second writer out of a run's folder.
- `disk_errors`: a full disk and other errors of the system, in one line each.
- `library_errors`: what the errors of other libraries mean.
- `terminal`: safe and complete output in any terminal.
- `subprocesses`: how Python processes are started, and how they end.
- `lazy_names`: names of a package that are imported at their first use.
- `runtime`: what every command sets up before JAX works.
"""

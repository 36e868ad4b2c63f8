"""Ray: the cluster a job runs on, actors, worker sessions, and the control files of a run."""

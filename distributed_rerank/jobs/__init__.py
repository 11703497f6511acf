"""What each job does once its command line is parsed: one module a job, thin over the rooms below."""

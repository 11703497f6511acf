"""What is read and written: catalogues, images, tables, artefact folders."""

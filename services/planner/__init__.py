"""The planner: watches the mesh, decides on the roles of its workers, and changes them or says what it would change."""

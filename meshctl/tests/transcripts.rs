//! The transcripts in `tests/cmd`, typed and compared. `TRYCMD=overwrite` writes what came out.

#[test]
fn transcripts_are_what_really_happens() {
    trycmd::TestCases::new()
        .case("tests/cmd/*.md")
        // No daemon, no context file, and the same width everywhere.
        .env("MESH_CONTEXT", "/nonexistent/context.toml")
        .env("MESH_SOCKET", "/nonexistent/node.sock")
        .env("MESH_CONTROLLER", "unix:/nonexistent/controller.sock")
        .env("COLUMNS", "110")
        .env("NO_COLOR", "1")
        .run();
}

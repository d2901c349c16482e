//! The figures of the main job, measured on real processes in private namespaces.
//!
//! Two shared cores: an absolute time is noise. Each figure stands beside a baseline of the same run.
#![forbid(unsafe_code)]

mod cfssl;
mod figures;
mod issuance;

use std::process::ExitCode;

fn main() -> ExitCode {
    // Before any thread starts: the namespaces are the whole process's.
    if let Err(error) = mesh_lab::enter() {
        eprintln!("error: {error}");
        return ExitCode::FAILURE;
    }
    let chosen: Vec<String> = std::env::args().skip(1).collect();
    for figure in figures::ALL {
        if chosen.is_empty() || chosen.iter().any(|name| name == figure.name) {
            println!("{}", figure.title);
            for line in (figure.measure)() {
                println!("  {line}");
            }
        }
    }
    ExitCode::SUCCESS
}

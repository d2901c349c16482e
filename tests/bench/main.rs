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
    let known: Vec<&str> = figures::ALL.iter().map(|figure| figure.name).collect();
    if let Some(unknown) = chosen.iter().find(|name| !known.contains(&name.as_str())) {
        eprintln!("error: no figure is called {unknown}; there are {}", known.join(", "));
        return ExitCode::from(2);
    }
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

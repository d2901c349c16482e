//! Compiles `mesh/v1/*.proto` with protox, which is Rust: no `protoc` is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=mesh");
    let files: Vec<_> = std::fs::read_dir("mesh/v1")?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    let descriptors = protox::compile(files, ["."])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    let mut bytes = Vec::new();
    prost_encode(&descriptors, &mut bytes)?;
    std::fs::write(out.join("descriptors.bin"), bytes)?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}

fn prost_encode(descriptors: &impl prost::Message, bytes: &mut Vec<u8>) -> Result<(), prost::EncodeError> {
    descriptors.encode(bytes)
}

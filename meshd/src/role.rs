//! From a parsed command line to a running role.

use std::{future::Future, path::PathBuf, sync::Arc};

use mesh_runtime::ShutdownToken;

use crate::{
    cli::{self, Cli, ConfigVerb},
    config::{Backend, ControllerSettings, LogFormat, NodeSettings, Settings, optional},
    failure::Failure,
    passphrase,
};

pub(crate) fn run(cli: Cli) -> Result<(), Failure> {
    // Whatever the caller's umask: what this process makes is its own.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    keep_memory_private()?;
    match cli.role {
        cli::Role::Controller(cli::Controller::Init(init)) => controller_init(init),
        cli::Role::Controller(cli::Controller::Restore(restore)) => controller_restore(restore),
        cli::Role::Controller(cli::Controller::Run(flags)) => controller_run(&Settings::controller(&flags)?),
        cli::Role::Controller(cli::Controller::Config { verb, run }) => {
            let settings = Settings::controller(&run)?;
            settings.parse::<ControllerSettings>()?;
            show(verb, &settings);
            Ok(())
        }
        cli::Role::Node(cli::Node::Run(flags)) => node_run(&Settings::node(&flags)?),
        cli::Role::Node(cli::Node::Config { verb, run }) => {
            let settings = Settings::node(&run)?;
            settings.parse::<NodeSettings>()?;
            show(verb, &settings);
            Ok(())
        }
    }
}

/// Keys and passphrases live in this process's memory: no core file, and no look into it for another process
/// of the same user (ptrace, `/proc/PID/mem`, `environ`).
fn keep_memory_private() -> Result<(), Failure> {
    use nix::sys::{prctl, resource};
    let refused = |errno| Failure::internal("cannot keep this process's memory private", &errno);
    resource::setrlimit(resource::Resource::RLIMIT_CORE, 0, 0).map_err(refused)?;
    prctl::set_dumpable(false).map_err(refused)
}

fn show(verb: ConfigVerb, settings: &Settings) {
    match verb {
        ConfigVerb::Check => eprintln!("the settings are valid"),
        ConfigVerb::Show { origin } => print!("{}", settings.show(origin)),
    }
}

fn controller_init(init: cli::ControllerInit) -> Result<(), Failure> {
    let (unlock, passphrase) = sealing(&init)?;
    let import = importing(&init)?;
    let key_store = init.key_store.as_deref().map(token_place).transpose()?;
    let mut pin = passphrase::pin(init.pin_file.as_deref())?;
    let unsaid = key_store.as_ref().is_some_and(|place| place.pin_source().is_none());
    if unsaid && pin.is_none() && passphrase::can_ask() {
        pin = Some(passphrase::ask_for("PIN of the hardware token")?);
    }
    let first_label = init.domain.split('.').next().unwrap_or_default().to_owned();
    let config = mesh_controller::InitConfig {
        state_dir: init.state_dir,
        domain: init.domain,
        name: init.name,
        fleet: init.fleet.unwrap_or(first_label),
        advertise: init.advertise,
        publish_url: init.publish_url,
        ipv4_pool: init.ipv4_pool,
        unlock,
        passphrase,
        import,
        key_store,
        pin,
        key_type: init.key_type,
    };
    let clock = || Arc::new(mesh_runtime::SystemClock);
    let summary = match mesh_controller::init(config.clone(), clock()) {
        Err(error)
            if error.code() == mesh_controller::ErrorCode::ImportPassphrase && passphrase::can_ask() =>
        {
            let passphrase = Some(passphrase::ask_for("passphrase of the CA to import")?);
            let import = config.import.map(|import| mesh_controller::ImportConfig { passphrase, ..import });
            mesh_controller::init(mesh_controller::InitConfig { import, ..config }, clock())?
        }
        made => made?,
    };
    let root: String = summary.root_spki_sha256.iter().map(|byte| format!("{byte:02x}")).collect();
    println!("mesh {} created in {}", summary.domain, summary.state_dir.display());
    println!("  root key sha256:{root}, until {}", summary.root_not_after.date());
    println!("  issuing CA until {}", summary.issuing_not_after.date());
    println!("  policy: every enrolled node may reach every other; see `meshctl policy show`");
    if summary.unlock == mesh_controller::Unlock::None {
        eprintln!("warning: the CA's keys are not sealed; whoever reads this disk or its backup is the CA");
    }
    println!("next: meshd controller run --state-dir {}", summary.state_dir.display());
    Ok(())
}

/// The CA that takes the place of a new one, if one was named.
fn importing(init: &cli::ControllerInit) -> Result<Option<mesh_controller::ImportConfig>, Failure> {
    use mesh_controller::ImportKind;
    let files: Vec<PathBuf> =
        [&init.import_issuer, &init.import_root, &init.import_key].into_iter().flatten().cloned().collect();
    let kind = match (&init.import_root, &init.import_issuer) {
        (_, Some(_)) => ImportKind::Issuer,
        (Some(_), None) => ImportKind::Root,
        (None, None) if files.is_empty() && init.import_crl.is_none() => return Ok(None),
        (None, None) => {
            return Err(Failure::config(
                "--import-key and --import-crl belong to a CA",
                "neither --import-root nor --import-issuer names one",
            ));
        }
    };
    let passphrase = init.import_passphrase_file.as_deref();
    let passphrase =
        passphrase.map(|path| passphrase::from_file_of(path, "--import-passphrase-file")).transpose()?;
    Ok(Some(mesh_controller::ImportConfig { kind, files, crl: init.import_crl.clone(), passphrase }))
}

fn token_place(uri: &str) -> Result<mesh_controller::HsmPlace, Failure> {
    mesh_controller::HsmPlace::parse(uri)
        .map_err(|problem| Failure::config("key_store cannot be used", format!("the URI {problem}")))
}

fn controller_restore(restore: cli::ControllerRestore) -> Result<(), Failure> {
    let passphrase = match &restore.backup_passphrase_file {
        Some(file) => passphrase::from_file_of(file, "--backup-passphrase-file")?,
        None if passphrase::can_ask() => passphrase::ask_for("passphrase of the backup")?,
        None => {
            return Err(Failure::passphrase(
                "no passphrase for the backup",
                "give --backup-passphrase-file F",
            ));
        }
    };
    let config =
        mesh_controller::RestoreConfig { state_dir: restore.state_dir, backup: restore.from, passphrase };
    let clock: mesh_runtime::SharedClock = Arc::new(mesh_runtime::SystemClock);
    let summary = mesh_controller::restore(&config, &clock)?;
    println!("mesh {} restored in {}", summary.domain, summary.state_dir.display());
    println!("  as of {}, records {} to {}", summary.taken_at, summary.first_seq, summary.seq);
    println!("  keys unlocked by {}, as before", summary.unlock.name());
    eprintln!("warning: what happened after the backup is forgotten; revoke again what was revoked since");
    println!("next: meshd controller run --state-dir {}", summary.state_dir.display());
    Ok(())
}

/// How the new keys shall be sealed; without a word from the caller, by whatever is there.
fn sealing(
    init: &cli::ControllerInit,
) -> Result<(mesh_controller::Unlock, Option<mesh_controller::Passphrase>), Failure> {
    use mesh_controller::Unlock;
    let file = init.passphrase_file.as_deref();
    match (init.unlock, file) {
        (Some(cli::Unlock::None), _) => Ok((Unlock::None, None)),
        (Some(cli::Unlock::File) | None, Some(file)) => {
            Ok((Unlock::File, Some(passphrase::from_file(file)?)))
        }
        (Some(cli::Unlock::Passphrase), Some(file)) => {
            Ok((Unlock::Passphrase, Some(passphrase::from_file(file)?)))
        }
        (Some(cli::Unlock::Credential), file) => {
            let passphrase = match file {
                Some(file) => Some(passphrase::from_file(file)?),
                None => passphrase::from_credential()?,
            };
            let missing = || {
                Failure::passphrase(
                    "no credential was handed over",
                    "run under systemd with LoadCredential=mesh-passphrase, or give --passphrase-file",
                )
            };
            Ok((Unlock::Credential, Some(passphrase.ok_or_else(missing)?)))
        }
        (Some(cli::Unlock::File), None) => Err(Failure::passphrase(
            "--unlock file needs --passphrase-file",
            "name the file with --passphrase-file F",
        )),
        (Some(cli::Unlock::Passphrase) | None, None) if passphrase::can_ask() => {
            Ok((Unlock::Passphrase, Some(passphrase::ask_new()?)))
        }
        (Some(cli::Unlock::Passphrase) | None, None) => Err(Failure::passphrase(
            "no passphrase for the CA's keys",
            "give --passphrase-file F, or --unlock credential, or --unlock none (then the keys lie on disk in clear)",
        )),
    }
}

fn controller_run(settings: &Settings) -> Result<(), Failure> {
    let parsed: ControllerSettings = settings.parse()?;
    let passphrase = match optional(&parsed.passphrase_file) {
        Some(file) => Some(passphrase::from_file(&PathBuf::from(file))?),
        None => passphrase::from_credential()?,
    };
    let pin = passphrase::pin(optional(&parsed.pin_file).map(PathBuf::from).as_deref())?;
    let bytes_per_second = parsed.relay_bytes_per_second;
    let relay = parsed.relay.then_some(mesh_controller::RelayLimit { bytes_per_second });
    let config = mesh_controller::RunConfig {
        state_dir: parsed.state_dir,
        listen: parsed.listen,
        socket: parsed.socket,
        advertise: parsed.advertise,
        passphrase,
        key_store: parsed.key_store,
        pin,
        publish_listen: parsed.publish_listen,
        publishing: mesh_controller::Publishing {
            url: optional(&parsed.publish_url),
            shards: parsed.crl_shards,
        },
        stun_listen: parsed.stun_listen,
        relay,
        metrics_listen: parsed.metrics_listen,
        retention: days(parsed.retention_days),
        announce: true,
    };
    let log = parsed.log_format;
    // Each is asked for once, and only if it is missed.
    let mut config = config;
    loop {
        let ended = serve(log, |shutdown| mesh_controller::run(config.clone(), shutdown))?;
        match ended {
            Err(mesh_controller::StartupError::PassphraseMissing)
                if config.passphrase.is_none() && passphrase::can_ask() =>
            {
                config.passphrase = Some(passphrase::ask()?);
            }
            Err(mesh_controller::StartupError::PinMissing)
                if config.pin.is_none() && passphrase::can_ask() =>
            {
                config.pin = Some(passphrase::ask_for("PIN of the hardware token")?);
            }
            ended => return Ok(ended?),
        }
    }
}

/// A number of days; 0 stands for ever.
fn days(number: u32) -> Option<std::time::Duration> {
    (number > 0).then(|| std::time::Duration::from_secs(u64::from(number) * 86_400))
}

fn node_run(settings: &Settings) -> Result<(), Failure> {
    let parsed: NodeSettings = settings.parse()?;
    let config = mesh_node::RunConfig {
        state_dir: parsed.state_dir,
        socket: parsed.socket,
        interface: parsed.interface,
        mtu: parsed.mtu,
        wg_port: parsed.wg_port,
        backend: match parsed.backend {
            Backend::Auto => mesh_node::Backend::Auto,
            Backend::Kernel => mesh_node::Backend::Kernel,
            Backend::Userspace => mesh_node::Backend::Userspace,
        },
        token_file: optional(&parsed.token_file).map(PathBuf::from),
        name: optional(&parsed.name),
        certs_dir: parsed.certs_dir,
        endpoints: parsed.endpoints,
    };
    Ok(serve(parsed.log_format, |shutdown| mesh_node::run(config, shutdown))??)
}

/// Runs a role on a runtime of its own until it ends or a signal ends it.
fn serve<F: Future>(log: LogFormat, role: impl FnOnce(ShutdownToken) -> F) -> Result<F::Output, Failure> {
    mesh_runtime::init_telemetry(match log {
        LogFormat::Text => mesh_runtime::LogFormat::Text,
        LogFormat::Json => mesh_runtime::LogFormat::Json,
    });
    // Two workers serve thousands of streams; each further one costs memory on every server.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::internal("cannot start the runtime", &error))?;
    runtime.block_on(async {
        let shutdown = mesh_runtime::shutdown_on_signals()
            .map_err(|error| Failure::internal("cannot listen for signals", &error))?;
        Ok(role(shutdown).await)
    })
}

//! What the system says of this process, and what the process asks of it. Read from `/proc`; where that is missing, nothing is known.

/// Resources of this process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Process {
    pub resident_bytes: u64,
    pub virtual_bytes: u64,
    /// User and system time together.
    pub cpu_seconds: f64,
    pub open_files: u64,
    /// Seconds since 1970; 0 if unknown.
    pub start_seconds: f64,
}

/// From now on what this process makes in the file system is for its user alone, whatever the umask that it was started with: also
/// the files of crates that ask for no mode.
pub fn keep_files_private() {
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
}

/// What tells the allocator how many milliseconds it keeps what was freed, before the system gets it back. Its own default is a second,
/// in which a member that is read without end frees more than a small limit leaves room for.
const ALLOCATOR_DELAY: (&str, &str) = ("MIMALLOC_PURGE_DELAY", "10");

/// For a process whose memory is limited: gives back soon what is freed. The allocator reads that before the program's first line, so
/// the program begins anew: in the same process, with the same arguments and files. Where it is said already, or the system refuses,
/// nothing happens.
pub fn give_memory_back_soon() {
    use std::os::unix::process::CommandExt as _;
    let (name, delay) = ALLOCATOR_DELAY;
    if std::env::var_os(name).is_some() {
        return;
    }
    let mut args = std::env::args_os();
    let (Some(called), Ok(program)) = (args.next(), std::env::current_exe()) else { return };
    let error = std::process::Command::new(program).arg0(called).args(args).env(name, delay).exec();
    eprintln!(
        "quorate: what is freed is given back to the system after a second only, for the program cannot begin anew: {error}"
    );
}

/// The limit of open files; `None` for no limit.
pub fn open_files_max() -> Option<u64> {
    rustix::process::getrlimit(rustix::process::Resource::Nofile).current
}

/// Raises the limit of open files as far as this process may; what it is then, `None` for no limit.
pub fn raise_open_files_max() -> Option<u64> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(_) => limit.current,
    }
}

/// Tells whoever supervises this process, as systemd's `sd_notify` does; nobody is told where `NOTIFY_SOCKET` names no socket.
pub fn tell_supervisor(state: &str) {
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::ffi::OsStrExt as _;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let Some(name) = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else { return };
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&name),
    };
    let told = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address));
    if let Err(error) = told {
        tracing::warn!(%error, socket = ?name, "the supervisor of this process cannot be told its state");
    }
}

/// From now on what this process writes to its standard error goes to its standard output.
pub fn join_error_to_output() -> std::io::Result<()> {
    Ok(rustix::stdio::dup2_stderr(rustix::stdio::stdout())?)
}

/// From now on what this process writes to its standard error goes to the end of a file.
pub fn join_error_to_file(path: &std::path::Path) -> std::io::Result<()> {
    let file = std::fs::OpenOptions::new().create(true).append(true).open(path)?;
    Ok(rustix::stdio::dup2_stderr(file)?)
}

/// Ticks a second in `/proc/self/stat`: always so on Linux.
const TICKS_A_SECOND: f64 = 100.0;

/// As it is now; some tens of microseconds.
pub fn this_process() -> Process {
    let page = rustix::param::page_size() as u64;
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let mut pages = statm.split(' ').map(|n| n.trim().parse::<u64>().unwrap_or(0));
    let (virtual_bytes, resident_bytes) = (pages.next().unwrap_or(0) * page, pages.next().unwrap_or(0) * page);
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The second field is a name in parentheses, that may hold anything.
    let fields: Vec<f64> = stat
        .rsplit_once(')')
        .map(|(_, rest)| rest.split_whitespace().map(|n| n.parse().unwrap_or(0.0)).collect())
        .unwrap_or_default();
    let field = |n: usize| fields.get(n).copied().unwrap_or(0.0) / TICKS_A_SECOND;
    let boot = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let boot = boot.lines().find_map(|line| line.strip_prefix("btime ")?.parse::<f64>().ok());
    Process {
        resident_bytes,
        virtual_bytes,
        cpu_seconds: field(11) + field(12),
        open_files: std::fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64),
        start_seconds: boot.map_or(0.0, |boot| boot + field(19)),
    }
}

/// Lowers the calling thread's priority, for good: its nice value is so much above the process's. Without effect where that is not allowed.
pub fn give_way(nicer: i32) {
    use rustix::process::{getpid, getpriority_process, setpriority_process};
    // On Linux the priority is a thread's, whatever POSIX says: here the first one's, which stands for the process, and the caller's.
    if let Ok(nice) = getpriority_process(Some(getpid())) {
        let _ = setpriority_process(None, nice + nicer);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn open_files_may_be_as_many_as_the_system_allows() {
        let raised = super::raise_open_files_max();
        assert_eq!(raised, super::raise_open_files_max());
        assert!(raised.is_none_or(|files| files >= 256), "{raised:?}");
    }

    #[test]
    fn a_thread_that_gives_way_does_so_once_and_alone() {
        let nice = || rustix::process::getpriority_process(None).unwrap();
        let before = nice();
        let below = std::thread::spawn(move || {
            super::give_way(5);
            super::give_way(5);
            nice()
        });
        assert_eq!((below.join().unwrap(), nice()), ((before + 5).min(19), before));
    }

    #[test]
    fn this_process_takes_something() {
        let now = super::this_process();
        assert!(now.resident_bytes > 1 << 20 && now.virtual_bytes >= now.resident_bytes, "{now:?}");
        assert!(now.open_files >= 3 && now.start_seconds > 1.6e9, "{now:?}");
    }
}

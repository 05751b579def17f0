//! How many threads compute fastest.

use std::{collections::BTreeSet, fs, path::Path, thread};

/// One for each core that this process may use: what threads of one core share, vector units and the way to memory, is what
/// computing needs. Where some cores are built for speed and others for their power, those for speed. No more than as many as
/// the process is granted time on.
pub fn default_threads() -> usize {
    let granted = thread::available_parallelism().map_or(1, usize::from);
    let allowed = fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| {
            let mut lines = status.lines();
            let list = lines.find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
            parse_list(list)
        });
    let cores = allowed.map(|allowed| fast_cores(Path::new("/sys/devices"), &allowed));
    cores.unwrap_or(granted).clamp(1, granted)
}

/// Cores among the processors `allowed`, as Linux describes them in `devices` (its `Documentation/admin-guide/cputopology.rst`).
/// A processor that is not described is a core.
fn fast_cores(devices: &Path, allowed: &BTreeSet<usize>) -> usize {
    let read = |path: String| fs::read_to_string(devices.join(path)).ok();
    // Hybrid processors of Intel list those for speed; Arm's have a capacity, of which the greatest of a system is 1024.
    let for_speed = read("cpu_core/cpus".to_owned()).and_then(|list| parse_list(&list));
    let capacity = |cpu: &usize| {
        let capacity = read(format!("system/cpu/cpu{cpu}/cpu_capacity"));
        capacity.and_then(|capacity| capacity.trim().parse::<u32>().ok())
    };
    let greatest = allowed.iter().filter_map(capacity).max().unwrap_or(0);
    let is_fast = |cpu: &usize| {
        let listed = for_speed.as_ref().is_none_or(|list| list.contains(cpu));
        listed && capacity(cpu).is_none_or(|capacity| capacity * 2 > greatest)
    };
    let core = |cpu: usize| {
        let threads = read(format!("system/cpu/cpu{cpu}/topology/thread_siblings_list"));
        let threads = threads.and_then(|list| parse_list(&list));
        threads
            .and_then(|threads| threads.first().copied())
            .unwrap_or(cpu)
    };
    let cores = |cpus: &mut dyn Iterator<Item = &usize>| {
        cpus.map(|&cpu| core(cpu)).collect::<BTreeSet<_>>().len()
    };
    match cores(&mut allowed.iter().filter(|cpu| is_fast(cpu))) {
        // Only others are allowed.
        0 => cores(&mut allowed.iter()),
        cores => cores,
    }
}

/// Numbers as in `0-3,8`.
fn parse_list(list: &str) -> Option<BTreeSet<usize>> {
    let mut numbers = BTreeSet::<usize>::new();
    for part in list.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        numbers.extend(first.parse().ok()?..=last.parse::<usize>().ok()?);
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    use tempfile::TempDir;

    use super::{fast_cores, parse_list};

    fn write(devices: &Path, path: &str, text: &str) {
        let path = devices.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// A system whose processors have the siblings `siblings`.
    fn system(siblings: &[&str]) -> TempDir {
        let devices = TempDir::new().unwrap();
        for (cpu, siblings) in siblings.iter().enumerate() {
            let path = format!("system/cpu/cpu{cpu}/topology/thread_siblings_list");
            write(devices.path(), &path, &format!("{siblings}\n"));
        }
        devices
    }

    fn cpus(list: &str) -> BTreeSet<usize> {
        parse_list(list).unwrap()
    }

    #[test]
    fn threads_of_one_core_count_once() {
        let devices = system(&["0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7"]);
        assert_eq!(fast_cores(devices.path(), &cpus("0-7")), 4);
        assert_eq!(fast_cores(devices.path(), &cpus("1,4-5")), 2);
        let devices = system(&["0-1", "0-1", "2-3", "2-3"]);
        assert_eq!(fast_cores(devices.path(), &cpus("0-3")), 2);
    }

    #[test]
    fn cores_that_save_power_do_not_count_unless_there_are_no_others() {
        let devices = system(&["0-1", "0-1", "2-3", "2-3", "4", "5", "6", "7"]);
        write(devices.path(), "cpu_core/cpus", "0-3\n");
        write(devices.path(), "cpu_atom/cpus", "4-7\n");
        assert_eq!(fast_cores(devices.path(), &cpus("0-7")), 2);
        assert_eq!(fast_cores(devices.path(), &cpus("5-7")), 3);

        let devices = system(&["0", "1", "2", "3", "4", "5"]);
        for (cpu, capacity) in [325, 325, 325, 870, 870, 1024].into_iter().enumerate() {
            let path = format!("system/cpu/cpu{cpu}/cpu_capacity");
            write(devices.path(), &path, &format!("{capacity}\n"));
        }
        assert_eq!(fast_cores(devices.path(), &cpus("0-5")), 3);
        assert_eq!(fast_cores(devices.path(), &cpus("0-2")), 3);
    }

    #[test]
    fn processors_that_are_not_described_are_cores() {
        let devices = TempDir::new().unwrap();
        assert_eq!(fast_cores(devices.path(), &cpus("0-2,7")), 4);
    }

    #[test]
    fn lists_are_read_as_linux_writes_them() {
        assert_eq!(cpus("\t0-2,5,8-9\n"), BTreeSet::from([0, 1, 2, 5, 8, 9]));
        assert_eq!(cpus("\n"), BTreeSet::new());
        assert_eq!(parse_list("0-x"), None);
    }
}

//! The sandbox's states, tried one by one and in random sequences.

use std::collections::HashSet;

use super::*;

fn id(text: &str) -> ContainerId {
    ContainerId::new(text).expect("id")
}

fn key(container: &str, exec: Option<&str>) -> ProcessKey {
    ProcessKey { container: id(container), exec: exec.map(|e| ExecId::new(e).expect("id")) }
}

const EXIT: Exit = Exit { status: 3, at_ns: 7 };

/// A sandbox with one running container; the next token is 3.
fn running(name: &str) -> Sandbox {
    let mut sandbox = Sandbox::default();
    assert_eq!(sandbox.apply(Event::Request(1, Request::Create(id(name)))), [Action::Perform(1)]);
    sandbox.apply(Event::Done(1, Ok(100)));
    sandbox.apply(Event::Request(2, Request::Start(key(name, None))));
    sandbox.apply(Event::Done(2, Ok(100)));
    assert_eq!(sandbox.snapshot(&key(name, None)).expect("exists").phase, Phase::Running);
    sandbox
}

fn refused(actions: &[Action]) -> Option<Refusal> {
    match actions {
        [Action::Answer(_, Answer::Refused(refusal))] => Some(*refusal),
        _ => None,
    }
}

#[test]
fn a_life() {
    let mut s = running("c1");
    assert_eq!(s.apply(Event::Request(3, Request::Wait(key("c1", None)))), []);
    assert!(matches!(
        refused(&s.apply(Event::Request(4, Request::Delete(key("c1", None))))),
        Some(Refusal::WrongPhase(_))
    ));
    let exit = s.apply(Event::Exited(key("c1", None), EXIT));
    let notice = Notice::Exit { process: key("c1", None), pid: 100, exit: EXIT };
    assert_eq!(exit, [Action::Publish(notice), Action::Answer(3, Answer::Exit(EXIT))]);
    assert_eq!(
        s.apply(Event::Request(5, Request::Wait(key("c1", None)))),
        [Action::Answer(5, Answer::Exit(EXIT))],
        "also after the fact"
    );
    assert_eq!(refused(&s.apply(Event::Request(6, Request::Kill(key("c1", None))))), Some(Refusal::Finished));
    assert_eq!(s.apply(Event::Request(7, Request::Query(key("c1", None)))), [Action::PerformStopped(7)]);
    assert_eq!(s.apply(Event::Request(8, Request::Shutdown)), [Action::Answer(8, Answer::Ok)], "a container remains");
    assert_eq!(s.apply(Event::Request(9, Request::Delete(key("c1", None)))), [Action::Perform(9)]);
    let gone = s.apply(Event::Done(9, Ok(0)));
    let notice = Notice::Delete { container: id("c1"), pid: 100, exit: EXIT };
    assert_eq!(gone, [Action::Answer(9, Answer::Performed), Action::Publish(notice), Action::StopVm]);
    assert_eq!(
        refused(&s.apply(Event::Request(10, Request::Delete(key("c1", None))))),
        Some(Refusal::NotFound),
        "twice"
    );
    assert_eq!(s.apply(Event::Request(11, Request::Shutdown)), [Action::Leave(11)]);
}

#[test]
fn an_exit_waits_for_the_start_and_for_the_execs() {
    let mut s = running("c1");
    s.apply(Event::Request(3, Request::Exec(id("c1"), ExecId::new("e1").expect("id"))));
    s.apply(Event::Done(3, Ok(0)));
    s.apply(Event::Request(4, Request::Start(key("c1", Some("e1")))));
    assert_eq!(s.apply(Event::Exited(key("c1", Some("e1")), EXIT)), [], "held back until the start is out");
    assert_eq!(s.apply(Event::Exited(key("c1", None), EXIT)), [Action::Hold(id("c1"))], "held back by the exec");
    assert!(matches!(
        refused(&s.apply(Event::Request(5, Request::Exec(id("c1"), ExecId::new("e2").expect("id"))))),
        Some(Refusal::WrongPhase(_))
    ));
    let out = s.apply(Event::Done(4, Ok(55)));
    let notices: Vec<_> = out.iter().filter(|a| matches!(a, Action::Publish(_))).cloned().collect();
    assert_eq!(
        notices,
        [
            Action::Publish(Notice::Start { process: key("c1", Some("e1")), pid: 55 }),
            Action::Publish(Notice::Exit { process: key("c1", Some("e1")), pid: 55, exit: EXIT }),
            Action::Publish(Notice::Exit { process: key("c1", None), pid: 100, exit: EXIT }),
        ]
    );
}

#[test]
fn an_exec_that_never_exits_does_not_hold_the_container_for_ever() {
    let mut s = running("c1");
    s.apply(Event::Request(3, Request::Exec(id("c1"), ExecId::new("e1").expect("id"))));
    s.apply(Event::Done(3, Ok(0)));
    s.apply(Event::Request(4, Request::Start(key("c1", Some("e1")))));
    s.apply(Event::Done(4, Ok(55)));
    s.apply(Event::Exited(key("c1", None), EXIT));
    let out = s.apply(Event::Overdue(id("c1")));
    assert_eq!(out.len(), 2);
    assert!(matches!(&out[0], Action::Publish(Notice::Exit { exit: Exit { status: KILLED, .. }, .. })));
}

#[test]
fn the_vm_takes_everything_with_it() {
    let mut s = running("c1");
    s.apply(Event::Request(3, Request::Create(id("c2"))));
    s.apply(Event::Done(3, Ok(100)));
    s.apply(Event::Request(4, Request::Wait(key("c2", None))));
    let out = s.apply(Event::VmGone(9));
    let lost = Exit { status: KILLED, at_ns: 9 };
    let exit = |name| Action::Publish(Notice::Exit { process: key(name, None), pid: 100, exit: lost });
    assert_eq!(out, [exit("c1"), exit("c2"), Action::Answer(4, Answer::Exit(lost))]);
    assert_eq!(refused(&s.apply(Event::Request(5, Request::Kill(key("c1", None))))), Some(Refusal::Finished));
    assert_eq!(refused(&s.apply(Event::Request(6, Request::Create(id("c3"))))), Some(Refusal::VmGone));
    assert_eq!(s.apply(Event::Request(7, Request::Delete(key("c1", None)))), [Action::Perform(7)]);
}

#[test]
fn a_container_that_never_started_is_killed_before_it_is_deleted() {
    let mut s = Sandbox::default();
    s.apply(Event::Request(1, Request::Create(id("c1"))));
    assert_eq!(refused(&s.apply(Event::Request(2, Request::Create(id("c2"))))), Some(Refusal::Booting));
    assert_eq!(refused(&s.apply(Event::Request(3, Request::Create(id("c1"))))), Some(Refusal::Exists));
    assert_eq!(refused(&s.apply(Event::Request(4, Request::Start(key("c1", None))))), Some(Refusal::NotFound));
    s.apply(Event::Done(1, Ok(100)));
    assert_eq!(s.apply(Event::Request(5, Request::Delete(key("c1", None)))), [Action::KillCreated(id("c1"))]);
    let out = s.apply(Event::Exited(key("c1", None), EXIT));
    assert_eq!(out.last(), Some(&Action::Perform(5)));
}

#[test]
fn a_delete_behind_another_shares_its_end() {
    let mut s = running("c1");
    s.apply(Event::Exited(key("c1", None), EXIT));
    let delete = |token| Event::Request(token, Request::Delete(key("c1", None)));
    assert_eq!(s.apply(delete(5)), [Action::Perform(5)]);
    assert_eq!(s.apply(delete(6)), []);
    assert_eq!(s.apply(delete(7)), []);
    let failed = s.apply(Event::Done(5, Err(())));
    assert_eq!(failed, [Action::Answer(5, Answer::Performed), Action::Perform(6)], "the next one tries");
    let notice = Notice::Delete { container: id("c1"), pid: 100, exit: EXIT };
    let done = s.apply(Event::Done(6, Ok(0)));
    let late = Action::Answer(7, Answer::Deleted(100, Some(EXIT)));
    assert_eq!(done, [Action::Answer(6, Answer::Performed), Action::Publish(notice), late, Action::StopVm]);
}

#[test]
fn a_failed_boot_leaves_nothing() {
    let mut s = Sandbox::default();
    s.apply(Event::Request(1, Request::Create(id("c1"))));
    assert_eq!(s.apply(Event::Done(1, Err(()))), [Action::Answer(1, Answer::Performed)]);
    assert!(s.cold() && s.snapshot(&key("c1", None)).is_none());
    assert_eq!(s.apply(Event::Request(2, Request::Create(id("c1")))), [Action::Perform(2)], "again");
}

#[test]
fn claims_of_the_guest_are_checked() {
    let mut s = running("c1");
    let suspect = |out: Vec<Action>| matches!(out[..], [Action::Suspect(..)]);
    assert!(suspect(s.apply(Event::Exited(key("other", None), EXIT))));
    assert!(suspect(s.apply(Event::Exited(key("c1", Some("e1")), EXIT))));
    assert!(suspect(s.apply(Event::Oom(id("other")))));
    assert_eq!(s.apply(Event::Oom(id("c1"))).len(), 1);
    assert_eq!(s.apply(Event::Oom(id("c1"))), [], "said once");
    assert_eq!(s.apply(Event::Exited(key("c1", None), EXIT)).len(), 1);
    assert!(suspect(s.apply(Event::Exited(key("c1", None), EXIT))), "second exit");
    assert!(suspect(s.apply(Event::Oom(id("c1")))), "after the exit");
}

/// xorshift64: random enough, and the same on every run.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }
}

/// What an observer has seen, and the promises that he holds the sandbox to.
#[derive(Default)]
struct Observer {
    asked: HashSet<Token>,
    answered: HashSet<Token>,
    performing: Vec<Token>,
    created: HashSet<ContainerId>,
    started: HashSet<ProcessKey>,
    exited: HashSet<ProcessKey>,
}

impl Observer {
    fn see(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Perform(token) => self.performing.push(token),
                Action::PerformStopped(token) | Action::Answer(token, _) | Action::Leave(token) => {
                    assert!(self.asked.contains(&token) && self.answered.insert(token), "answered twice: {token}");
                }
                Action::Publish(notice) => self.hear(notice),
                _ => {}
            }
        }
    }

    fn hear(&mut self, notice: Notice) {
        match notice {
            Notice::Create { container, .. } => assert!(self.created.insert(container)),
            Notice::Start { process, .. } => {
                assert!(self.created.contains(&process.container) && !self.exited.contains(&process));
                assert!(self.started.insert(process), "started twice");
            }
            Notice::Exit { process, .. } => {
                assert!(self.created.contains(&process.container));
                if process.exec.is_some() {
                    assert!(self.started.contains(&process));
                } else {
                    let mut execs = self.started.iter().filter(|p| p.container == process.container);
                    assert!(execs.all(|p| p.exec.is_none() || self.exited.contains(p)), "execs exit first");
                }
                assert!(self.exited.insert(process), "exited twice");
            }
            Notice::Oom { container } => assert!(!self.exited.contains(&ProcessKey { container, exec: None })),
            Notice::Delete { container, .. } => {
                assert!(self.exited.contains(&ProcessKey { container: container.clone(), exec: None }));
                assert!(self.created.remove(&container));
                self.started.retain(|p| p.container != container);
                self.exited.retain(|p| p.container != container);
            }
            _ => {}
        }
    }
}

#[test]
fn random_sequences_keep_the_promises() {
    for seed in 1..=2000u64 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut sandbox = Sandbox::default();
        let mut observer = Observer::default();
        let mut deleted_execs: HashSet<ProcessKey> = HashSet::new();
        for step in 0..200u64 {
            let container = ["c1", "c2"][random.below(2)];
            let exec = [None, Some("e1"), Some("e2")][random.below(3)];
            let target = key(container, exec);
            let event = match random.below(14) {
                0 | 1 if !observer.performing.is_empty() => {
                    let token = observer.performing.swap_remove(random.below(observer.performing.len()));
                    Event::Done(token, if random.below(4) == 0 { Err(()) } else { Ok(step as u32 + 1) })
                }
                2 | 3 => Event::Exited(target, Exit { status: step as u32, at_ns: 0 }),
                4 => Event::Oom(target.container),
                5 if random.below(40) == 0 => Event::VmGone(1),
                5 => Event::Overdue(target.container),
                n => {
                    let request = match (n, exec) {
                        (6, _) => Request::Create(target.container),
                        // An exec id is only used once here, so that the observer may tell the processes apart.
                        (7, Some(e)) if deleted_execs.insert(target.clone()) => {
                            Request::Exec(target.container, ExecId::new(e).expect("id"))
                        }
                        (8, _) => Request::Start(target),
                        (9, _) => Request::Delete(target),
                        (10, _) => Request::Kill(target),
                        (11, _) => Request::Wait(target),
                        (12, _) => Request::Query(target),
                        _ => Request::Pause(target.container),
                    };
                    observer.asked.insert(step);
                    Event::Request(step, request)
                }
            };
            if let Event::Request(_, Request::Create(id)) = &event {
                deleted_execs.retain(|k| k.container != *id || observer.created.contains(id));
            }
            let actions = sandbox.apply(event);
            observer.see(actions);
        }
        // The end of everything: the VM goes, what was begun ends, and then nothing may hang.
        let actions = sandbox.apply(Event::VmGone(2));
        observer.see(actions);
        while let Some(token) = observer.performing.pop() {
            let actions = sandbox.apply(Event::Done(token, Ok(1)));
            observer.see(actions);
        }
        for name in ["c1", "c2"] {
            observer.asked.insert(1000);
            observer.answered.remove(&1000);
            let actions = sandbox.apply(Event::Request(1000, Request::Delete(key(name, None))));
            observer.see(actions);
            if observer.performing.pop().is_some() {
                let actions = sandbox.apply(Event::Done(1000, Ok(0)));
                observer.see(actions);
            }
        }
        assert!(observer.created.is_empty(), "seed {seed}: {:?} was never deleted", observer.created);
        let open: Vec<_> = observer.asked.difference(&observer.answered).collect();
        assert!(open.is_empty(), "seed {seed}: never answered: {open:?}");
    }
}

// Command start-postgres is the entrypoint of the PostgreSQL image: it makes the database on first start and then becomes
// the server. It does what a shell script would, without a shell in the image.
//
//	POSTGRES_PASSWORD_FILE or POSTGRES_PASSWORD   the superuser's password, required on first start
//	POSTGRES_USER (postgres)  POSTGRES_DB (the user's name)  PGDATA (/var/lib/postgresql/data/pg)
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

const (
	bin = "/usr/lib/postgresql/15/bin/"
	uid = 100
	gid = 102
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "start-postgres:", err)
		os.Exit(1)
	}
}

func env(k, otherwise string) string {
	if v := os.Getenv(k); v != "" {
		return v
	}
	return otherwise
}

func run() error {
	data := env("PGDATA", "/var/lib/postgresql/data/pg")
	os.Setenv("PGDATA", data)
	for _, d := range []string{data, "/run/postgresql"} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return err
		}
		if err := os.Chown(d, uid, gid); err != nil {
			return err
		}
	}
	if err := os.Chmod("/run/postgresql", 0o755); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(data, "PG_VERSION")); os.IsNotExist(err) {
		if err := create(data); err != nil {
			return err
		}
	}
	if err := drop(); err != nil {
		return err
	}
	args := append([]string{"postgres", "-D", data}, os.Args[1:]...)
	return syscall.Exec(bin+"postgres", args, os.Environ())
}

// drop becomes the user postgres, for good.
func drop() error {
	if err := syscall.Setgroups([]int{gid}); err != nil {
		return err
	}
	if err := syscall.Setgid(gid); err != nil {
		return err
	}
	return syscall.Setuid(uid)
}

// as runs a program as the user postgres.
func as(stdin string, name string, args ...string) error {
	cmd := exec.Command(bin+name, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), os.Stdout, os.Stderr
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid}}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// create makes the cluster beside its place and moves it there: a start that is cut off leaves no half database.
func create(data string) error {
	password := os.Getenv("POSTGRES_PASSWORD")
	if f := os.Getenv("POSTGRES_PASSWORD_FILE"); f != "" {
		b, err := os.ReadFile(f)
		if err != nil {
			return err
		}
		password = strings.TrimRight(string(b), "\r\n")
	}
	if password == "" {
		return fmt.Errorf("set POSTGRES_PASSWORD_FILE or POSTGRES_PASSWORD: without a password nobody could log in")
	}
	user := env("POSTGRES_USER", "postgres")
	tmp := data + ".new"
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := os.MkdirAll(tmp, 0o700); err != nil {
		return err
	}
	if err := os.Chown(tmp, uid, gid); err != nil {
		return err
	}
	pw := "/run/postgresql/pw"
	if err := os.WriteFile(pw, []byte(password+"\n"), 0o600); err != nil {
		return err
	}
	defer os.Remove(pw)
	if err := os.Chown(pw, uid, gid); err != nil {
		return err
	}
	if err := as("", "initdb", "-D", tmp, "-U", user, "--pwfile="+pw, "--auth-local=trust", "--auth-host=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8"); err != nil {
		return err
	}
	for file, lines := range map[string]string{
		"pg_hba.conf":     "host all all all scram-sha-256\n",
		"postgresql.conf": "listen_addresses = '*'\nunix_socket_directories = '/run/postgresql'\ndynamic_shared_memory_type = mmap\nlog_destination = 'stderr'\njit = off\n",
	} {
		f, err := os.OpenFile(filepath.Join(tmp, file), os.O_APPEND|os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		if _, err = f.WriteString(lines); err != nil {
			return err
		}
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			return err
		}
	}
	if db := env("POSTGRES_DB", user); db != "postgres" {
		sql := fmt.Sprintf("CREATE DATABASE \"%s\" OWNER \"%s\";\n", strings.ReplaceAll(db, `"`, `""`), strings.ReplaceAll(user, `"`, `""`))
		if err := as(sql, "postgres", "--single", "-D", tmp, "postgres"); err != nil {
			return err
		}
	}
	if err := os.Remove(data); err != nil && !os.IsNotExist(err) {
		return err
	}
	return os.Rename(tmp, data)
}
